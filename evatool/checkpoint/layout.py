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

A folder with its final name and a manifest is whole: everything is written into a temporary folder beside it, flushed
to the disk, and renamed. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

MODEL, EXTRA, OPTIMIZER = "model.safetensors", "extra.safetensors", "optimizer.safetensors"
GROUPS, TRAIN_STATE, MODEL_CONFIG = "groups.json", "train_state.json", "model_config.json"
RESOLVED, MANIFEST = "resolved.toml", "MANIFEST.json"
ALWAYS_THERE = frozenset({MODEL, OPTIMIZER, GROUPS, TRAIN_STATE, MODEL_CONFIG, RESOLVED})
FORMAT_VERSION = 1

MODEL_PREFIX = "model."
"""The trained model's prefix in the objective's `state_dict()`; left out in model.safetensors."""

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
    """A binary file being written that knows its size and SHA-256."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append."""
        self._file.write(data)
        self._sha256.update(data)
        self.size += len(data)

    def entry(self) -> dict[str, Any]:
        """The file's line in the manifest."""
        return {"bytes": self.size, "sha256": self._sha256.hexdigest()}


def write_file(path: Path, write: Callable[[HashingFile], None]) -> dict[str, Any]:
    """Write a new file and flush it to the disk; returns its manifest entry."""
    with path.open("xb") as raw:
        file = HashingFile(raw)
        write(file)
        raw.flush()
        os.fsync(raw.fileno())
    return file.entry()


def write_json(path: Path, value: Any) -> dict[str, Any]:
    """Write a JSON file and flush it to the disk; returns its manifest entry."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    return write_file(path, lambda file: file.write(text.encode()))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file, one tensor in memory at a time, and flush it; returns its manifest entry.

    The library's own writer makes the same bytes but holds them all, does not flush, and hides the operating system's
    error (such as a full disk) in its own.
    Source: the format as described at https://github.com/huggingface/safetensors#format.
    """
    # Largest alignment first, as the library does, so that every tensor starts at a multiple of its item size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        num_bytes = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + num_bytes],
        }
        offset += num_bytes
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)

    def write(file: HashingFile) -> None:
        file.write(len(head).to_bytes(8, "little"))
        file.write(head)
        for name in names:
            file.write(_little_endian_bytes(tensors[name]))

    return write_file(path, write)


def _little_endian_bytes(tensor: Tensor) -> memoryview:
    assert sys.byteorder == "little", "safetensors are little-endian"
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries (new names, renames) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
