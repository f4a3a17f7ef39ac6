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
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from evatool.core.bounded_json import JsonBoundError, parse_json
from evatool.core.errors import CheckpointError
from evatool.core.regular_files import open_regular

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
MAX_HEADER_BYTES = 16 * 2**20
"""Limit for the header of a file, a sixth of the format's own: 100,000 tensors fit."""

_MAX_DIMS = 64
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


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor of a file; its bytes are [start, end) behind the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsMap(TensorMap):
    """A safetensors file. Its whole header is checked on opening, against the file's true size.

    Raises CheckpointError for a damaged or truncated file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= size - 8:
                raise CheckpointError("this is not a whole safetensors file", where=str(path), fix=_AGAIN)
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"the safetensors header has {length} bytes",
                    where=str(path),
                    expected=f"at most {MAX_HEADER_BYTES}",
                    fix="save the tensors in several files, or without their metadata",
                )
            self.metadata, self._entries = _parsed_header(file.read(length), path)
        self._start = 8 + length
        end = max((entry.end for entry in self._entries.values()), default=0)
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
            with open_regular(self.path, buffering=0) as file:
                file.seek(self._start + self._entries[name].start + start * tensor.itemsize)
                read_into(file, tensor, self.path, name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape from the header."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype from the header."""
        return self._entries[name].dtype


def _parsed_header(raw: bytes, path: Path) -> tuple[dict[str, str], dict[str, _Entry]]:
    """(metadata, entries); the entries lie one after the other, without a gap and without sharing a byte."""
    entries: dict[str, _Entry] = {}
    try:
        header: dict[str, dict[str, Any]] = parse_json(raw)
        metadata = header.pop("__metadata__", {})
        for name, found in header.items():
            entries[name] = _entry(name, found, path)
        spans = sorted((entry.start, entry.end) for entry in entries.values())
        if any(end != start for (_, end), (start, _) in zip([(0, 0), *spans], spans, strict=False)):
            raise CheckpointError("the header lets tensors overlap, or leaves gaps", where=str(path), fix=_AGAIN)
        return {str(key): str(value) for key, value in metadata.items()}, entries
    except JsonBoundError as error:
        raise CheckpointError(f"the safetensors header is too large: {error}", where=str(path)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError("the safetensors header cannot be read", where=str(path), fix=_AGAIN) from error


def _entry(name: str, found: dict[str, Any], path: Path) -> _Entry:
    (start, end), shape = found["data_offsets"], found["shape"]
    where = {"where": str(path), "fix": _AGAIN}
    if len(shape) > _MAX_DIMS or any(type(n) is not int or not 0 <= n < 2**63 for n in (start, end, *shape)):
        raise CheckpointError(f"the header's sizes of {name[:200]} are no whole numbers of 64 bits", **where)
    if found["dtype"] not in DTYPE_BY_NAME:
        raise CheckpointError(f"{name[:200]} has dtype {str(found['dtype'])[:20]}, which is not supported", **where)
    dtype = DTYPE_BY_NAME[found["dtype"]]
    if end - start != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"the header's sizes of {name[:200]} contradict each other", **where)
    return _Entry(dtype, tuple(shape), start, end)


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
