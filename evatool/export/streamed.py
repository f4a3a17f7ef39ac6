"""Exports of models larger than the memory: one tensor at a time from file to file, verified block by block."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evatool.core.errors import EvatoolError
from evatool.export.folder import Exported, Target, staged_folder, write_json, write_text
from evatool.export.read_back import ReadBack
from evatool.export.verify import relative_difference
from evatool.export.written import CastMap, Tower, tower_tensors
from evatool.formats.safetensors import TensorMap, shape_of, tensor_bytes
from evatool.model.clip import TOWER
from evatool.model.config import ModelConfig
from evatool.model.vision import build_trunk, restore_buffers
from evatool.weights.load import UnloadedClip

# B inputs, N tokens, D width

NamedBlock = Callable[[int], dict[str, Tensor]]
"""Number of a block -> its parameters under timm's names, without the block's own prefix."""
BlockOutput = Callable[[int], Tensor]
"""Number of an image tower's block -> its output for the same fixed input."""

VERIFIED = (
    "read back by {}; every tensor has the same bits, and every block of the image tower gave the same output when "
    "it was built from the source and from the file"
)
"""The card's words on how a streamed export was verified; the gap is for what read it back."""


def named_block(tensors: TensorMap) -> NamedBlock:
    """The blocks of an image tower under our names."""

    def read(number: int) -> dict[str, Tensor]:
        prefix = f"{TOWER}blocks.{number}."
        return {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}

    return read


@dataclass(frozen=True)
class StreamedFormat:
    """The way one format is written tensor by tensor.

    Attributes:
        weights: name of the weight file.
        write: writes it from a mapping, one tensor at a time.
        read: opens it as its library does, one tensor at a time; names as written.
        configs: JSON files beside it, by name; the last makes the folder a model for its readers.
        card: the model card, from the largest difference and what read the file back.
        tower: the tower that is written; both when None.
        rename: our tensors under the names that are written.
        block: from the tensors that were read back, a block as the format's readers find it.
    """

    weights: str
    write: Callable[[Path, Mapping[str, Tensor]], None]
    read: Callable[[Path], ReadBack]
    configs: Mapping[str, Mapping[str, Any]]
    card: Callable[[float, str], str]
    tower: Tower | None = None
    rename: Callable[[TensorMap], TensorMap] = lambda tensors: tensors
    block: Callable[[TensorMap], NamedBlock] = named_block


def export_streamed(layout: StreamedFormat, clip: UnloadedClip, dtype: torch.dtype, target: Target) -> Exported:
    """Write the target folder, holding one tensor (or one block) at a time.

    Read back by the format's library, every tensor must have the bits that were to be written; then every block of the
    image tower is built twice, from the source and from the export, and must give the same output for one input.

    Args:
        dtype: of the written weights.
    Raises: EvatoolError on any difference beyond the tolerance, and on a full disk; then nothing is left.
    """
    tensors = layout.rename(tower_tensors(clip.tensors, layout.tower, dtype))
    num_blocks = clip.config.depth if clip.config.is_eva and layout.tower != "text" else 0
    files = (layout.weights, "README.md", *layout.configs)
    with staged_folder(target, files) as work:
        layout.write(work / layout.weights, tensors)
        read = layout.read(work / layout.weights)
        _same_bits(read, tensors, target.folder)
        source = _block_output(clip.config, named_block(CastMap(clip.tensors, dtype)))
        exported = _block_output(clip.config, layout.block(read))
        largest = _compare_blocks(num_blocks, source, exported, target)
        reader = read.reader
        del read, exported
        for name, table in layout.configs.items():
            write_json(work / name, table)
        write_text(work / "README.md", layout.card(largest, VERIFIED.format(reader)))
    return Exported(target.folder, files, largest)


def _block_output(config: ModelConfig, parameters: NamedBlock) -> BlockOutput:
    """The output of one block at a time, built from `parameters`, in float32, for one fixed input."""

    @torch.no_grad()
    def run(number: int) -> Tensor:
        with torch.device("meta"):
            trunk = build_trunk(config.with_depth(1))
        block = trunk.blocks[0]
        block.load_state_dict({name: t.float() for name, t in parameters(number).items()}, strict=True, assign=True)
        restore_buffers(block)
        rope = None
        if trunk.rope is not None:
            restore_buffers(trunk.rope)
            rope = trunk.rope.get_embed()
        tokens = 1 + config.grid[0] * config.grid[1]
        x = torch.randn(2, tokens, config.width, generator=torch.Generator().manual_seed(number))
        output: Tensor = block.eval()(x, rope=rope)
        return output

    return run


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
