"""Exports of models larger than the memory: one tensor at a time from file to file, verified block by block."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evatool.core.errors import EvatoolError
from evatool.export.folder import Exported, Target, staged_folder, write_json, write_text
from evatool.export.verify import relative_difference
from evatool.formats.safetensors import TensorMap, shape_of, tensor_bytes

# B inputs, N tokens, D width

BlockOutput = Callable[[int], Tensor]
"""Number of an image tower's block -> its output for the same fixed input."""


@dataclass(frozen=True)
class StreamedFormat:
    """One format's files.

    Attributes:
        weights: name of the weight file.
        write: writes it from a mapping, one tensor at a time.
        read: opens it as its library does, one tensor at a time; names as written.
        configs: JSON files beside it, by name; the last makes the folder a model for its readers.
        card: the model card, from the largest difference and what read the file back.
    """

    weights: str
    write: Callable[[Path, Mapping[str, Tensor]], None]
    read: Callable[[Path], ReadBack]
    configs: Mapping[str, Mapping[str, Any]]
    card: Callable[[float, str], str]


class ReadBack(TensorMap):
    """The tensors of a written file.

    Attributes:
        reader: what reads it, in words.
    """

    reader = "the format's library"
    _shapes: dict[str, tuple[int, ...]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as the file says."""
        return self._shapes[name]


def export_streamed(
    layout: StreamedFormat,
    tensors: Mapping[str, Tensor],
    num_blocks: int,
    source_block: BlockOutput,
    exported_block: Callable[[Mapping[str, Tensor]], BlockOutput],
    target: Target,
) -> Exported:
    """Write the target folder, holding one tensor (or one block) at a time.

    Read back by the format's library, every tensor must have the bits that were to be written; then every block of the
    image tower is built twice, from the source and from the export, and must give the same output for one input.

    Raises: EvatoolError on any difference beyond the tolerance, and on a full disk; then nothing is left.
    """
    files = (layout.weights, "README.md", *layout.configs)
    with staged_folder(target, files) as work:
        layout.write(work / layout.weights, tensors)
        read = layout.read(work / layout.weights)
        _same_bits(read, tensors, target.folder)
        largest = _compare_blocks(num_blocks, source_block, exported_block(read), target)
        reader = read.reader
        del read
        for name, table in layout.configs.items():
            write_json(work / name, table)
        write_text(work / "README.md", layout.card(largest, reader))
    return Exported(target.folder, files, largest)


def _same_bits(read: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: Path) -> None:
    names = set(read)
    changed = sorted(names ^ set(tensors)) + [n for n in tensors if n in names and not _equal(read, tensors, n)]
    if changed:
        raise EvatoolError(
            f"{len(changed)} tensors of the export differ when it is read back: {', '.join(changed[:6])}",
            where=str(where),
            fix="nothing was written; please report it with the model's configuration",
        )


def _equal(read: Mapping[str, Tensor], tensors: Mapping[str, Tensor], name: str) -> bool:
    if shape_of(read, name) != shape_of(tensors, name):
        return False
    return _checksum(read[name]) == _checksum(tensors[name])  # one of them in memory at a time


def _checksum(tensor: Tensor) -> tuple[torch.dtype, bytes]:
    return tensor.dtype, hashlib.sha256(tensor_bytes(tensor.contiguous())).digest()


def _compare_blocks(num_blocks: int, source: BlockOutput, exported: BlockOutput, target: Target) -> float:
    largest = 0.0
    for number in range(num_blocks):
        difference = relative_difference(exported(number), source(number))
        if not difference <= target.tolerance:
            raise EvatoolError(
                f"block {number} of the reloaded export differs from the source's by {difference:.2e}",
                where=str(target.folder),
                expected=f"at most {target.tolerance:.0e} (relative L2)",
                fix="nothing was written; please report it with the model's configuration",
            )
        largest = max(largest, difference)
    return largest
