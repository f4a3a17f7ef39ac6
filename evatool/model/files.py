"""Weight files as lazy mappings: a tensor is read when asked for, so that nothing is held twice.

No pickle is ever executed: torch archives are parsed with a closed table of inert stand-ins (`pickles.py`).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from evatool.errors import CheckpointError
from evatool.model.names import shape_of

_SAFETENSORS_DTYPES = {
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
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


class SafetensorsState(Mapping[str, Tensor]):
    """A safetensors file. The whole header is checked on opening, against the file's true size.

    Raises CheckpointError for a damaged or truncated file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    "this is not a whole safetensors file", where=str(path), fix="copy or download the file again"
                )
            header = _parsed_header(file.read(length), path)
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self._entries = header
        self._start = 8 + length
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if self._start + end != size:
            raise CheckpointError(
                f"the file is {size} bytes, its header describes {self._start + end}",
                where=str(path),
                fix="copy or download the file again",
            )

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        start, end = entry["data_offsets"]
        tensor = torch.empty(entry["shape"], dtype=_SAFETENSORS_DTYPES[entry["dtype"]])
        if start == end:
            return tensor
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._start + start)
            read_into(file, tensor, self.path, name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape from the header."""
        return tuple(self._entries[name]["shape"])


class MergedState(Mapping[str, Tensor]):
    """Several states as one. `owners` names the state of each tensor."""

    def __init__(self, owners: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._owners = dict(owners)

    def __getitem__(self, name: str) -> Tensor:
        return self._owners[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    def __len__(self) -> int:
        return len(self._owners)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape without reading the data."""
        return shape_of(self._owners[name], name)


def _parsed_header(raw: bytes, path: Path) -> dict[str, dict]:
    try:
        header = json.loads(raw)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            count = 1
            for side in entry["shape"]:
                count *= side
            if entry["dtype"] not in _SAFETENSORS_DTYPES:
                raise CheckpointError(f"{name} has dtype {entry['dtype']}, which is not supported", where=str(path))
            if end - start != count * _SAFETENSORS_DTYPES[entry["dtype"]].itemsize or start < 0:
                raise CheckpointError(f"the header's sizes of {name} contradict each other", where=str(path))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            "the safetensors header cannot be read", where=str(path), fix="copy or download the file again"
        ) from error
    return header


def read_into(file: object, tensor: Tensor, path: Path, name: str) -> None:
    """Fill a contiguous CPU tensor from the current position of a binary file; short files raise CheckpointError."""
    buffer = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(
                f"the file ends inside {name}", where=str(path), fix="copy or download the file again"
            )
        done += count


def open_weights(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a weight file, by content and not by name: safetensors or any torch archive.

    Raises CheckpointError for what is neither, damaged, or holds objects that are not plain data.
    """
    if not path.exists():
        raise CheckpointError("there is no such file", where=str(path))
    if path.stat().st_size == 0:
        raise CheckpointError("the file is empty", where=str(path), fix="copy or download the file again")
    from evatool.model.pickles import open_torch_archive

    with path.open("rb") as file:
        head = file.read(9)
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return open_torch_archive(path)
    if head[8:9] == b"{":
        return SafetensorsState(path)
    raise CheckpointError(
        "this is no weight file that evatool reads",
        where=str(path),
        expected="safetensors, or a torch archive (.pt, .bin, .pth)",
    )
