"""Torch archives read as data. Only the names in this file's tables are known; nothing else is imported or called.

Reads zip archives (`torch.save` since 1.6, TorchScript files of OpenAI's CLIP included) tensor by tensor, and the
older single-pickle format through torch's own `weights_only` loader.
Why not that loader for all: it refuses TorchScript files and DeepSpeed's checkpoints, whose pickles name classes, and
it touches the whole file even when it maps it (480 MB of 512, this 16 at most: docs/benchmarks.md#weight-files).
"""

from __future__ import annotations

import collections
import io
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evatool.core.errors import CheckpointError
from evatool.formats.safetensors import TensorMap, read_into, tensor_bytes

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _STORAGES.values()}

# Classes of DeepSpeed, argparse and others that sit beside the weights in published files: kept as inert records.
_RECORDS = {
    ("argparse", "Namespace"),
    ("types", "SimpleNamespace"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib", "WindowsPath"),
    ("easydict", "EasyDict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.runtime.zero.config", "DeepSpeedZeroConfig"),
    ("deepspeed.runtime.zero.partition_parameters", "ZeroParamStatus"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
    ("deepspeed.runtime.zero.offload_config", "OffloadDeviceEnum"),
    ("torch.nn.parameter", "Parameter"),
    ("torch", "Tensor"),
    ("torch.jit._pickle", "restore_type_tag"),
    ("torch.jit._pickle", "build_intlist"),
    ("torch.jit._pickle", "build_tensorlist"),
    ("torch.jit._pickle", "build_doublelist"),
    ("torch.jit._pickle", "build_boollist"),
}


class Record:
    """An inert stand-in: remembers what it was made from and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.state = args, kwargs

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(self.state, dict):
            self.state[key] = value

    def append(self, value: Any) -> None:
        """A list item of the original."""

    def extend(self, values: Any) -> None:
        """List items of the original."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in an archive."""

    storage: str
    dtype: torch.dtype
    storage_size: int  # elements
    offset: int  # elements
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    size: int


class ArchiveMap(TensorMap):
    """The tensors of a zip archive under dotted names. `scalars` holds the plain values beside them."""

    def __init__(self, path: Path, tensors: dict[str, StoredTensor], reader: Archive, scalars: dict[str, Any]) -> None:
        self.path, self._tensors, self._reader, self.scalars = path, tensors, reader, scalars

    def __getitem__(self, name: str) -> Tensor:
        return self._reader.tensor(self._tensors[name], name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape from the pickle."""
        return self._tensors[name].size

    def dtype(self, name: str) -> torch.dtype:
        """Dtype from the pickle."""
        return self._tensors[name].dtype


# What zipfile, pickle and torch's own reader raise on flipped or missing bytes.
_DAMAGE = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    struct.error,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    RuntimeError,
    OSError,  # a seek to a nonsensical place
)


def open_torch_archive(path: Path) -> Mapping[str, Tensor]:
    """The state dict in a torch file. Raises CheckpointError for damage, for unknown classes (by name) and for
    files without tensors."""
    root, reader = read_archive(path)
    return state_from(root, reader, path)


def read_archive(path: Path) -> tuple[Any, Archive | None]:
    """The object tree of a torch file, tensors as `StoredTensor` (None as reader: plain tensors, older format)."""
    try:
        if zipfile.is_zipfile(path):
            archive = Archive(path)
            return archive.root(), archive
    except _DAMAGE as error:
        raise CheckpointError(
            f"the archive is damaged: {error}", where=str(path), fix="copy or download the file again"
        ) from error
    return _read_legacy(path), None


def state_from(root: Any, reader: Archive | None, path: Path) -> Mapping[str, Tensor]:
    """The state dict inside an object tree, in EVA's order of wrappers: model, module, state_dict, else flat."""
    tree = root.state if isinstance(root, Record) else root
    for wrapper in ("model_ema", "model", "module", "state_dict"):
        if isinstance(tree, Mapping) and isinstance(tree.get(wrapper), Mapping):
            tree = tree[wrapper]
            break
    tensors: dict[str, Any] = {}
    scalars: dict[str, Any] = {}
    _flatten(tree, "", tensors, scalars)
    if not tensors:
        raise CheckpointError("there are no tensors in this file", where=str(path))
    return tensors if reader is None else ArchiveMap(path, tensors, reader, scalars)


def _flatten(tree: Any, prefix: str, tensors: dict[str, Any], scalars: dict[str, Any]) -> None:
    if isinstance(tree, Record):  # a TorchScript module: attributes, some of them modules
        tree = tree.state
    if not isinstance(tree, Mapping):
        return
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, StoredTensor | Tensor):
            tensors[name] = value
        elif isinstance(value, Mapping | Record):
            _flatten(value, f"{name}.", tensors, scalars)
        elif isinstance(value, bool | int | float | str):
            scalars[name] = value


class Archive:
    """A zip archive of `torch.save` or TorchScript."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with zipfile.ZipFile(path) as archive:
            self._entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in self._entries if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(pickles) != 1:
            raise CheckpointError(
                "this zip file is not a torch archive", where=str(path), expected="one data.pkl inside"
            )
        self._prefix = pickles[0].removesuffix("data.pkl")
        order = self._entries.get(f"{self._prefix}byteorder")
        if order is not None and self._bytes(order) != b"little":
            raise CheckpointError("big-endian torch archives are not supported", where=str(path))

    def _bytes(self, info: zipfile.ZipInfo) -> bytes:
        with zipfile.ZipFile(self.path) as archive:
            return archive.read(info)

    def root(self) -> Any:
        """The object tree, built from inert pieces."""
        data = self._bytes(self._entries[f"{self._prefix}data.pkl"])
        return _DataUnpickler(data, self.path).load()

    def tensor(self, stored: StoredTensor, name: str) -> Tensor:
        """Read one tensor."""
        if 0 in stored.size:
            return torch.empty(stored.size, dtype=stored.dtype)
        span = 1 + sum((n - 1) * step for n, step in zip(stored.size, stored.stride, strict=True))
        return self._elements(stored, 0, span, name).as_strided(stored.size, stored.stride)

    def part(self, stored: StoredTensor, start: int, count: int, name: str) -> Tensor:
        """Elements `start` to `start + count` of a one-dimensional tensor, without reading the others."""
        assert len(stored.size) == 1, f"{name} is not flat"
        if start + count > stored.size[0]:
            raise CheckpointError(f"{name} reaches beyond its partition", where=str(self.path))
        return self._elements(stored, start * stored.stride[0], count, name)

    def _elements(self, stored: StoredTensor, start: int, count: int, name: str) -> Tensor:
        """Consecutive elements from a tensor's storage; where they are all of it, its checksum is compared."""
        info = self._entries.get(f"{self._prefix}data/{stored.storage}")
        if info is None or info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"the data of {name} is missing from the archive", where=str(self.path))
        flat = torch.empty(count, dtype=stored.dtype)
        first_byte = (stored.offset + start) * stored.dtype.itemsize
        if first_byte + flat.nbytes > info.file_size:
            raise CheckpointError(f"the data of {name} is shorter than its shape", where=str(self.path))
        with self.path.open("rb", buffering=0) as file:
            file.seek(info.header_offset + 26)  # the local header's variable lengths may differ from the directory's
            name_length, extra_length = struct.unpack("<HH", file.read(4))
            file.seek(info.header_offset + 30 + name_length + extra_length + first_byte)
            read_into(file, flat, self.path, name)
        if flat.nbytes == info.file_size and zlib.crc32(tensor_bytes(flat)) != info.CRC:
            raise CheckpointError(
                f"the data of {name} does not match its checksum",
                where=str(self.path),
                fix="copy or download the file again",
            )
        return flat


def _rebuild_tensor(storage: _Storage, offset: int, size: Any, stride: Any, *_: Any) -> StoredTensor:
    return StoredTensor(storage.key, storage.dtype, storage.size, offset, tuple(size), tuple(stride))


def _first(value: Any, *_: Any) -> Any:
    return value


def _rebuild_subclass(rebuild: Any, _kind: Any, arguments: tuple[Any, ...], *_: Any) -> Any:
    """A tensor subclass or a tensor with attributes: the plain tensor of it."""
    if rebuild not in _FUNCTIONS.values():
        raise pickle.UnpicklingError(f"{rebuild!r} rebuilds no tensor")
    return rebuild(*arguments)


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_subclass,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): lambda *_: {},
    ("builtins", "dict"): dict,
    ("builtins", "list"): list,
    ("builtins", "set"): set,
    ("builtins", "int"): int,
    ("builtins", "float"): float,
    ("builtins", "bool"): bool,
    ("builtins", "str"): str,
    ("torch", "Size"): lambda sides=(): tuple(sides),
    ("torch", "device"): lambda *parts: str(parts),
}


class _DataUnpickler(pickle.Unpickler):
    """Builds plain containers, `StoredTensor`s and `Record`s; every other class is refused by name."""

    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(data))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _FUNCTIONS:
            return _FUNCTIONS[module, name]
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) in _RECORDS or module.startswith("__torch__"):
            return type(name, (Record,), {"__module__": module})
        raise _refusal(f"{module}.{name}", self._path)

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _location, size = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"unknown reference {kind!r}")
        return _Storage(str(key), dtype, size)


def _refusal(name: str, path: Path) -> CheckpointError:
    return CheckpointError(
        f"the file contains an object of {name}, which is not plain data and was not loaded",
        where=str(path),
        expected="tensors and plain containers",
        fix="save the state dict alone, or convert the file to safetensors where it was made",
    )


def _read_legacy(path: Path) -> Any:
    """A file of torch before 1.6, through torch's own restricted loader."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        refused = re.search(r"(?i:unsupported) (?:global|class|GLOBAL)[^\w]*(?:GLOBAL )?([\w.]+)", str(error))
        if refused:
            raise _refusal(refused.group(1), path) from error
        # torch's own words would advise to switch the restriction off
        raise CheckpointError(
            "this file cannot be read as weights: it is damaged, or no torch file",
            where=str(path),
            fix="copy or download the file again, or convert it to safetensors where it was made",
        ) from error
