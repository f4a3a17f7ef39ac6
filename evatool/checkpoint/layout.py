"""Where the parts of a checkpoint are, and how its files are written.

    checkpoints/step_00001000/
        model.safetensors      the trained model's float32 weights and buffers, by its own names
        extra.safetensors      the objective's other weights; absent if there are none
        optimizer.safetensors  exp_avg.<name>, exp_avg_sq.<name>, num_updates
        groups.json            parameter groups: names, learning rates, decay
        train_state.json       step, samples seen, loader position, skipped steps
        model_config.json      the model's shape and task
        resolved.toml          the recipe
        MANIFEST.json          size and SHA-256 of every file above; written last

The files are the same whatever engine and world size wrote them; only the manifest tells the ranks apart, since each
writes its own ranges of a tensor file and knows the SHA-256 of those alone. All ranks need one shared file system.

A folder with its final name and a manifest is whole: everything is written into a temporary folder beside it, flushed
to the disk, and renamed. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from evatool.distributed.engines.sharded_state import ShardedState, StateShard

MODEL, EXTRA, OPTIMIZER = "model.safetensors", "extra.safetensors", "optimizer.safetensors"
AVERAGE = "ema.safetensors"  # the moving average of the model's weights, by its own names
GROUPS, TRAIN_STATE, MODEL_CONFIG = "groups.json", "train_state.json", "model_config.json"
RESOLVED, MANIFEST = "resolved.toml", "MANIFEST.json"
ALWAYS_THERE = frozenset({MODEL, OPTIMIZER, GROUPS, TRAIN_STATE, MODEL_CONFIG, RESOLVED})
FORMAT_VERSION = 2
READABLE_FORMATS = (1, 2)  # format 1 had one SHA-256 for every file

MODEL_PREFIX = "model."
"""The trained model's prefix in the objective's `state_dict()`; left out in model.safetensors."""
AVERAGE_PREFIX = "ema.model."
"""The prefix of its moving average in what is saved; left out in ema.safetensors."""

_STEP_NAME = re.compile(r"step_(\d{8,})")
_PART_NAME = re.compile(r"\.step_\d{8,}\.part-.*")

SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, below the `checkpoints` folder."""
    return folder / f"step_{step:08d}"


def steps_in(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints with a final name, oldest first; whether they are whole is not looked at."""
    if not folder.is_dir():
        return []
    found = [(m, path) for path in folder.iterdir() if (m := _STEP_NAME.fullmatch(path.name)) and path.is_dir()]
    return sorted((int(m.group(1)), path) for m, path in found)


def unfinished_in(folder: Path) -> list[Path]:
    """Temporary folders that a crash left behind."""
    return [path for path in folder.iterdir() if _PART_NAME.fullmatch(path.name)] if folder.is_dir() else []


class HashingFile:
    """A binary file being written that knows the ranges written and their SHA-256, in the order of writing."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._end = 0
        self.ranges: list[list[int]] = []

    def seek(self, offset: int) -> None:
        """Go on writing there."""
        self._file.seek(offset)
        self._end = offset

    def write(self, data: bytes | memoryview) -> None:
        """Append at the current place."""
        self._file.write(data)
        self._sha256.update(data)
        start, self._end = self._end, self._end + len(data)
        if self.ranges and self.ranges[-1][1] == start:
            self.ranges[-1][1] = self._end
        elif len(data):
            self.ranges.append([start, self._end])

    def sha256(self) -> str:
        """Of everything written, in hex."""
        return self._sha256.hexdigest()


def write_file(path: Path, write: Callable[[HashingFile], None], mode: str = "xb") -> HashingFile:
    """Write a file (a new one where `mode` is "xb") and flush it to the disk; returns what was written."""
    with path.open(mode) as raw:
        file = HashingFile(raw)
        write(file)
        raw.flush()
        os.fsync(raw.fileno())
    return file


def entry_of(file: HashingFile) -> dict[str, Any]:
    """The manifest's line of a file that was written in one go."""
    return {"bytes": sum(end - start for start, end in file.ranges), "sha256": file.sha256()}


def write_json_entry(path: Path, value: Any) -> dict[str, Any]:
    """Write a JSON file and flush it to the disk; returns its manifest entry."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    return entry_of(write_file(path, lambda file: file.write(text.encode())))


class TensorLayout:
    """Where tensors lie in a safetensors file: it follows from their names, shapes and dtypes alone.

    The library's own writer makes the same bytes but holds them all, does not flush, and hides the operating system's
    error (such as a full disk) in its own.
    Source: the format as described at https://github.com/huggingface/safetensors#format.
    """

    def __init__(self, state: ShardedState) -> None:
        self._item_size = {name: dtype.itemsize for name, dtype in state.dtypes.items()}
        # Largest alignment first, as the library does, so that every tensor starts at a multiple of its item size.
        names = sorted(state.shapes, key=lambda name: (-self._item_size[name], name))
        header: dict[str, Any] = {}
        end = 0
        for name in names:
            start, end = end, end + math.prod(state.shapes[name]) * self._item_size[name]
            header[name] = {
                "dtype": SAFETENSORS_DTYPES[state.dtypes[name]],
                "shape": list(state.shapes[name]),
                "data_offsets": [start, end],
            }
        head = json.dumps(header, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        self.head = len(head).to_bytes(8, "little") + head
        self._start = {name: len(self.head) + entry["data_offsets"][0] for name, entry in header.items()}
        self.num_bytes = len(self.head) + end

    def offset(self, piece: StateShard) -> int:
        """Of a piece's first byte in the file."""
        offset: int = self._start[piece.name] + piece.start * self._item_size[piece.name]
        return offset


def create_tensor_file(path: Path, state: ShardedState) -> None:
    """A new file of its final size, for the ranks to write their ranges into."""
    with path.open("xb") as raw:
        raw.truncate(TensorLayout(state).num_bytes)


def write_ranges(path: Path, state: ShardedState, *, is_first: bool) -> dict[str, Any]:
    """Write this rank's pieces into a file that was created, one in memory at a time, and flush them.

    Args:
        is_first: this rank writes the header too.
    Returns: the ranges in bytes and their SHA-256, for the manifest.
    """
    plan = TensorLayout(state)

    def write(file: HashingFile) -> None:
        if is_first:
            file.write(plan.head)
        for piece in sorted(state.pieces, key=plan.offset):
            file.seek(plan.offset(piece))
            file.write(_little_endian_bytes(piece.values))

    file = write_file(path, write, mode="r+b")
    return {"ranges": file.ranges, "sha256": file.sha256()}


def _little_endian_bytes(tensor: Tensor) -> memoryview:
    assert sys.byteorder == "little", "safetensors are little-endian"
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


_CHUNK_BYTES = 1 << 20


def sha256_of(path: Path, ranges: Sequence[Sequence[int]] | None = None) -> str:
    """SHA-256 of a file in hex, or of some of its bytes, [start, end) by [start, end)."""
    with path.open("rb", buffering=0) as file:
        if ranges is None:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        for start, end in ranges:
            file.seek(start)
            while start < end and (chunk := file.read(min(end - start, _CHUNK_BYTES))):
                digest.update(chunk)
                start += len(chunk)
        return digest.hexdigest()
