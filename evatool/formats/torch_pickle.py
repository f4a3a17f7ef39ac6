"""Torch archives read as data. Only the names in this file's tables are known; nothing else is imported or called.

Reads zip archives (`torch.save` since 1.6, TorchScript files of OpenAI's CLIP included) and the older format, in which
pickles stand in front of the data, tensor by tensor. What a file may take of memory: docs/limits.md.
Why not torch's `weights_only` loader: it refuses TorchScript files and DeepSpeed's checkpoints, whose pickles name
classes, and it touches the whole file even when it maps it (480 MB of 512, this 16 at most:
docs/benchmarks.md#weight-files).
"""

from __future__ import annotations

import collections
import math
import os
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from evatool.core.errors import CheckpointError
from evatool.core.regular_files import open_regular
from evatool.formats.pickle_reader import Budget, PickleError, PickleReader, checked_key
from evatool.formats.safetensors import TensorMap, read_into, tensor_bytes
from evatool.formats.zip_directory import ZipMember, member_start, read_directory

MAX_PICKLE_BYTES = 64 * 2**20
"""Limit for the description of the tensors in a file, which `data.pkl` holds."""

MAX_NAMES = 200_000
"""Tensors, values and modules of a file; what a file holds twice by reference counts twice."""

MAX_DEPTH = 64
MAX_NAME_CHARS = 1000
_MAX_DIMS = 64
_MAX_EXPANDED = 2**20  # numbers of a tensor that repeats what is stored, as `expand` leaves it
_AGAIN = "copy or download the file again"

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
    ("lightning.fabric.utilities.data", "AttributeDict"),
    ("lightning_fabric.utilities.data", "AttributeDict"),
    ("pytorch_lightning.utilities.parsing", "AttributeDict"),
    ("lightning.pytorch.utilities.parsing", "AttributeDict"),
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

    @property
    def span(self) -> int:
        """Elements of the storage from the tensor's first to its last; of one that is not empty."""
        return 1 + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))


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


# What damaged bytes make of the readers below.
_DAMAGE = (
    PickleError,
    struct.error,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
    RecursionError,
    OSError,  # a seek to a nonsensical place
)


def open_torch_archive(path: Path) -> Mapping[str, Tensor]:
    """The tensors in a torch file by their paths in it. Raises CheckpointError for damage, for unknown classes (by
    name) and for files without tensors."""
    root, reader = read_archive(path)
    return state_from(root, reader, path)


def read_archive(path: Path) -> tuple[Any, Archive]:
    """The object tree of a torch file, tensors as `StoredTensor`, and what reads those."""
    try:
        with open_regular(path) as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        archive = ZipArchive(path) if is_zip else LegacyArchive(path)
        return archive.root, archive
    except _DAMAGE as error:
        raise CheckpointError(
            "this file cannot be read as weights: it is damaged, or no torch file"
            if str(error) == ""
            else f"the archive is damaged, or no torch file: {str(error)[:300]}",
            where=str(path),
            fix=f"{_AGAIN}, or convert it to safetensors where it was made",
        ) from error


def state_from(root: Any, reader: Archive, path: Path) -> Mapping[str, Tensor]:
    """The tensors of an object tree: each is named by the keys on the way to it."""
    names = _Names(path)
    names.add(root, "", 0)
    if not names.tensors:
        raise CheckpointError("there are no tensors in this file", where=str(path))
    return ArchiveMap(path, names.tensors, reader, names.scalars)


class _Names:
    """The dotted names of a tree: each path to a tensor or plain value. A tree may hold itself: depth is bounded."""

    def __init__(self, path: Path) -> None:
        self.path, self.left = path, MAX_NAMES
        self.tensors: dict[str, StoredTensor] = {}
        self.scalars: dict[str, Any] = {}

    def add(self, tree: Any, prefix: str, depth: int) -> None:
        """All names below `tree`. Raises: CheckpointError beyond a bound."""
        if isinstance(tree, Record):  # a TorchScript module: attributes, some of them modules
            tree = tree.state
        if not isinstance(tree, Mapping):
            return
        for key, value in tree.items():
            self.left -= 1
            if not isinstance(key, str | int):
                continue
            name = f"{prefix}{key}"
            if self.left < 0 or depth > MAX_DEPTH or len(name) > MAX_NAME_CHARS:
                raise CheckpointError(
                    "the file's tables hold each other too often",
                    where=str(self.path),
                    expected=f"at most {MAX_NAMES} names of {MAX_NAME_CHARS} characters, {MAX_DEPTH} tables deep",
                    fix="save the state dict alone, with torch.save",
                )
            if isinstance(value, StoredTensor):
                self.tensors[name] = value
            elif isinstance(value, Mapping | Record):
                self.add(value, f"{name}.", depth + 1)
            elif isinstance(value, bool | int | float | str):
                self.scalars[name] = value


# ------------------------------------------------------------------------------------------------------- archives


@dataclass(frozen=True)
class _Span:
    """The bytes of a storage in the file; their checksum where the file has one."""

    start: int
    size: int
    crc: int | None = None


class Archive(ABC):
    """A torch file: the tree of what it holds, and its tensors when they are asked for."""

    path: Path
    root: Any
    """The object tree, built from inert pieces."""

    @abstractmethod
    def span(self, storage: str) -> _Span | None:
        """Where a storage lies; None where the file does not have it."""

    def tensor(self, stored: StoredTensor, name: str) -> Tensor:
        """Read one tensor."""
        if 0 in stored.size:
            return torch.empty(stored.size, dtype=stored.dtype)
        return self._elements(stored, 0, stored.span, name).as_strided(stored.size, stored.stride)

    def part(self, stored: StoredTensor, start: int, count: int, name: str) -> Tensor:
        """Elements [start, start + count) of a one-dimensional tensor, without reading the others."""
        if len(stored.size) != 1 or start + count > stored.size[0]:
            raise CheckpointError(f"{name} reaches beyond its partition", where=str(self.path))
        return self._elements(stored, start * stored.stride[0], count, name)

    def _elements(self, stored: StoredTensor, start: int, count: int, name: str) -> Tensor:
        """Consecutive elements from a tensor's storage; where they are all of it, its checksum is compared."""
        try:
            span = self.span(stored.storage)
        except _DAMAGE as error:
            raise CheckpointError(f"{name}: {error}", where=str(self.path), fix=_AGAIN) from error
        if span is None:
            raise CheckpointError(f"the data of {name} is missing from the archive", where=str(self.path))
        first_byte = (stored.offset + start) * stored.dtype.itemsize
        if first_byte + count * stored.dtype.itemsize > span.size:
            raise CheckpointError(f"the data of {name} is shorter than its shape", where=str(self.path))
        flat = torch.empty(count, dtype=stored.dtype)
        with open_regular(self.path, buffering=0) as file:
            file.seek(span.start + first_byte)
            read_into(file, flat, self.path, name)
        if span.crc is not None and flat.nbytes == span.size and zlib.crc32(tensor_bytes(flat)) != span.crc:
            raise CheckpointError(f"the data of {name} does not match its checksum", where=str(self.path), fix=_AGAIN)
        return flat


class ZipArchive(Archive):
    """A zip archive of `torch.save` or TorchScript."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as file:
            self._members = read_directory(file, str(path))
            pickles = [name for name in self._members if name.endswith("/data.pkl") or name == "data.pkl"]
            if len(pickles) != 1:
                raise CheckpointError(
                    "this zip file is not a torch archive", where=str(path), expected="one data.pkl inside"
                )
            self._prefix = pickles[0].removesuffix("data.pkl")
            order = self._members.get(f"{self._prefix}byteorder")
            if order is not None and self._bytes(file, order, "byteorder") != b"little":
                raise CheckpointError("big-endian torch archives are not supported", where=str(path))
            data = self._bytes(file, self._members[pickles[0]], "data.pkl")
        self.root = _reader(data, path).load()

    def _bytes(self, file: BinaryIO, member: ZipMember, name: str) -> bytes:
        if member.size > MAX_PICKLE_BYTES:
            raise _too_long(f"{name} has {member.size} bytes", self.path)
        file.seek(member_start(file, member))
        data = file.read(member.size)
        if zlib.crc32(data) != member.crc:
            raise ValueError(f"{name} does not match its checksum")
        return data

    def span(self, storage: str) -> _Span | None:
        """Where a storage lies."""
        member = self._members.get(f"{self._prefix}data/{storage}")
        if member is None:
            return None
        with open_regular(self.path) as file:
            return _Span(member_start(file, member), member.size, member.crc)


class LegacyArchive(Archive):
    """A file of torch before 1.6: magic number, protocol, machine, object and the storages' keys, each a pickle; then
    the storages, each behind its number of elements.

    It is what `_legacy_save` in torch/serialization.py writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            storages: dict[str, _Storage] = {}
            reader = _reader(file.read(MAX_PICKLE_BYTES), path, storages)
            if reader.load() != _LEGACY_MAGIC:
                raise ValueError("it does not begin with torch's magic number")
            if reader.load() != _LEGACY_PROTOCOL or not isinstance(machine := reader.load(), dict):
                raise ValueError("it is of another protocol")
            if machine.get("little_endian") is not True:
                raise CheckpointError("big-endian torch files are not supported", where=str(path))
            self.root = reader.load()
            keys = reader.load()
            if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
                raise ValueError("the keys of its data are no texts")
            self._spans: dict[str, _Span] = {}
            at = reader.at
            for key in keys:
                file.seek(at)
                (count,) = struct.unpack("<q", file.read(8))
                span = _Span(at + 8, count * storages[key].dtype.itemsize)
                if count < 0 or span.start + span.size > size:
                    raise ValueError("its data end early")
                self._spans[key] = span
                at = span.start + span.size

    def span(self, storage: str) -> _Span | None:
        """Where a storage lies."""
        return self._spans.get(storage)


_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


# -------------------------------------------------------------------------------------- what stands for the classes


def _rebuild_tensor(_: Budget, storage: Any, offset: Any, size: Any, stride: Any, *__: Any) -> StoredTensor:
    numbers = (offset, *size, *stride)
    if not isinstance(storage, _Storage) or len(size) != len(stride) or len(size) > _MAX_DIMS:
        raise PickleError("a tensor without storage or shape")
    if any(type(number) is not int or not 0 <= number < 2**62 for number in numbers):
        raise PickleError("a tensor whose sizes are no whole numbers")
    if math.prod(size) > max(storage.size, _MAX_EXPANDED):
        raise PickleError(f"a tensor of shape {list(size)} in a storage of {storage.size} numbers")
    return StoredTensor(storage.key, storage.dtype, storage.size, offset, tuple(size), tuple(stride))


def _first(_: Budget, value: Any, *__: Any) -> Any:
    return value


def _rebuild_subclass(budget: Budget, rebuild: Any, _kind: Any, arguments: Any, *_: Any) -> Any:
    """A tensor subclass or a tensor with attributes: the plain tensor of it."""
    if rebuild not in (_rebuild_tensor, _first):
        raise PickleError("something that rebuilds no tensor")
    return rebuild(budget, *arguments)


def _table(budget: Budget, items: Any = ()) -> dict[Any, Any]:
    """A dict or OrderedDict of another table, or of pairs."""
    budget.spend(120 * len(items))
    pairs = items.items() if isinstance(items, dict) else items
    return collections.OrderedDict((checked_key(key), value) for key, value in pairs)


def _list(budget: Budget, items: Any = ()) -> list[Any]:
    budget.spend(16 * len(items))
    return list(items)


def _set(budget: Budget, items: Any = ()) -> set[Any]:
    budget.spend(120 * len(items))
    return {checked_key(item) for item in items}


def _size(budget: Budget, sides: Any = ()) -> tuple[Any, ...]:
    return tuple(_list(budget, sides))


def _device(_: Budget, *parts: Any) -> str:
    return ":".join(part[:100] if isinstance(part, str) else str(_plain(part)) for part in parts[:2])


def _plain(value: Any) -> str | int | float | bool:
    """A short plain value. Raises: PickleError: the text of a nest of tables could be endless."""
    if not isinstance(value, str | int | float | bool) or (isinstance(value, str) and len(value) > 1000):
        raise PickleError(f"a plain value of {type(value).__name__}")
    return value


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_subclass,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("collections", "OrderedDict"): _table,
    ("collections", "defaultdict"): lambda *_: {},
    ("builtins", "dict"): _table,
    ("builtins", "list"): _list,
    ("builtins", "set"): _set,
    ("builtins", "int"): lambda _, value=0: int(_plain(value)),
    ("builtins", "float"): lambda _, value=0.0: float(_plain(value)),
    ("builtins", "bool"): lambda _, value=False: bool(_plain(value)),
    ("builtins", "str"): lambda _, value="": str(_plain(value)),
    ("torch", "Size"): _size,
    ("torch", "device"): _device,
}
_CALLABLE = {id(function) for function in _FUNCTIONS.values()}


def _reader(data: bytes, path: Path, storages: dict[str, _Storage] | None = None) -> PickleReader:
    """Builds plain containers, `StoredTensor`s and `Record`s; every other class is refused by name.

    Args:
        storages: gets every storage that the pickle names.
    """

    def find_class(module: str, name: str) -> Any:
        if (module, name) in _FUNCTIONS:
            return _FUNCTIONS[module, name]
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) in _RECORDS or module.startswith("__torch__"):
            return type(name, (Record,), {"__module__": module})
        raise _refusal(f"{module}.{name}", path)

    def persistent_load(pid: Any) -> _Storage:
        kind, dtype, key, _location, size, *view = pid
        is_number = type(size) is int and 0 <= size < 2**62
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not is_number or any(view):
            raise PickleError("an unknown reference")
        storage = _Storage(str(_plain(key)), dtype, size)
        if storages is not None:
            storages[storage.key] = storage
        return storage

    return PickleReader(
        data,
        str(path),
        find_class=find_class,
        persistent_load=persistent_load,
        can_call=lambda function: id(function) in _CALLABLE,
        record=Record,
    )


def _refusal(name: str, path: Path) -> CheckpointError:
    return CheckpointError(
        f"the file contains an object of {name[:200]}, which is not plain data and was not loaded",
        where=str(path),
        expected="tensors and plain containers",
        fix="save the state dict alone, or convert the file to safetensors where it was made",
    )


def _too_long(what: str, path: Path) -> CheckpointError:
    return CheckpointError(
        f"the archive's {what}",
        where=str(path),
        expected=f"at most {MAX_PICKLE_BYTES}",
        fix="save the state dict alone, with torch.save",
    )
