"""Named tensors on disk, read and written one at a time. Imports torch.

The safetensors format as described at https://github.com/huggingface/safetensors#format.
Why not the library: its functions hold the whole file (of 512 MB they peak at 480 to read and to write, these at 16 and
64: docs/benchmarks.md#weight-files), do not flush it to the disk, and hide the operating system's error (a full disk).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from evatool.core.errors import CheckpointError

DTYPE_BY_NAME = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAME_BY_DTYPE = {dtype: name for name, dtype in DTYPE_BY_NAME.items()}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_AGAIN = "copy or download the file again"


class TensorMap(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for; shapes and dtypes are known without reading."""

    gives_copies = True
    """True where every read gives memory of its own, which the reader may keep and change."""

    def __contains__(self, name: object) -> bool:
        """Without reading the tensor, which `Mapping` would."""
        try:
            self.shape(name)  # type: ignore[arg-type]
        except KeyError:
            return False
        return True

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self[name].dtype


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """Shape of a tensor of any mapping, without reading its data where the mapping knows it."""
    return tensors.shape(name) if isinstance(tensors, TensorMap) else tuple(tensors[name].shape)


def dtype_of(tensors: Mapping[str, Tensor], name: str) -> torch.dtype:
    """Dtype of a tensor of any mapping, without reading its data where the mapping knows it."""
    return tensors.dtype(name) if isinstance(tensors, TensorMap) else tensors[name].dtype


class SafetensorsMap(TensorMap):
    """A safetensors file. Its whole header is checked on opening, against the file's true size.

    Raises CheckpointError for a damaged or truncated file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError("this is not a whole safetensors file", where=str(path), fix=_AGAIN)
            header = _parsed_header(file.read(length), path)
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self._entries = header
        self._start = 8 + length
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if self._start + end != size:
            raise CheckpointError(
                f"the file has {size} bytes, but its header describes {self._start + end}",
                where=str(path),
                fix=_AGAIN,
            )

    def __getitem__(self, name: str) -> Tensor:
        return self.piece(name, 0, math.prod(self.shape(name))).reshape(self.shape(name))

    def piece(self, name: str, start: int, numel: int) -> Tensor:
        """Numbers [start, start + numel) of the flat tensor; only they are read."""
        tensor = torch.empty(numel, dtype=self.dtype(name))
        if numel:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self._start + self._entries[name]["data_offsets"][0] + start * tensor.itemsize)
                read_into(file, tensor, self.path, name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape from the header."""
        return tuple(self._entries[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """Dtype from the header."""
        return DTYPE_BY_NAME[self._entries[name]["dtype"]]


def _parsed_header(raw: bytes, path: Path) -> dict[str, dict[str, Any]]:
    try:
        header: dict[str, dict[str, Any]] = json.loads(raw)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            if any(type(number) is not int or number < 0 for number in (start, end, *entry["shape"])):
                raise CheckpointError(f"the header's sizes of {name} are no whole numbers", where=str(path))
            if entry["dtype"] not in DTYPE_BY_NAME:
                raise CheckpointError(f"{name} has dtype {entry['dtype']}, which is not supported", where=str(path))
            if end - start != math.prod(entry["shape"]) * DTYPE_BY_NAME[entry["dtype"]].itemsize:
                raise CheckpointError(f"the header's sizes of {name} contradict each other", where=str(path))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError("the safetensors header cannot be read", where=str(path), fix=_AGAIN) from error
    return header


def read_into(file: IO[bytes], tensor: Tensor, path: Path, name: str) -> None:
    """Fill a contiguous CPU tensor from the current position of an unbuffered file.

    Raises: CheckpointError where the file ends too early.
    """
    buffer = tensor_bytes(tensor)
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"the file ends inside {name}", where=str(path), fix=_AGAIN)
        done += count


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a new file, one tensor in memory at a time, and flush it to the disk.

    Tensors may be on any device, and may share memory: each is written in full.
    """
    # Largest items first, as the library does, so that every tensor starts at a multiple of its item size.
    names = sorted(tensors, key=lambda name: (-dtype_of(tensors, name).itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        shape, dtype = shape_of(tensors, name), dtype_of(tensors, name)
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAME_BY_DTYPE[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for name in names:
            file.write(tensor_bytes(tensors[name].detach().cpu().contiguous()))
        file.flush()
        os.fsync(file.fileno())
