"""Export of a model that is not loaded: for what is larger than the memory."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from timm.models.eva import checkpoint_filter_fn
from torch import Tensor

from evatool.core.errors import RecipeError
from evatool.export.baai import baai_config, baai_state
from evatool.export.folder import Exported, Target
from evatool.export.model_card import CardFacts
from evatool.export.open_clip import card_of as open_clip_card
from evatool.export.open_clip import config_of as open_clip_config
from evatool.export.streamed import BlockOutput, ReadBack, StreamedFormat, export_streamed
from evatool.export.tensors import BAAI_NOTE, SAFETENSORS_NOTE, card_of
from evatool.formats.safetensors import SafetensorsMap, TensorMap, write_safetensors
from evatool.formats.torch_zip import write_torch_archive
from evatool.model.clip import TOWER
from evatool.model.vision import build_trunk, restore_buffers
from evatool.recipe.schema.export import ExportSection
from evatool.stages.exporting.formats import CastMap, open_clip_description
from evatool.weights.load import UnloadedClip
from evatool.weights.mapped_tensors import tensors_below

STREAMABLE = ("open_clip", "safetensors", "baai")
_HEADROOM = 1.3  # of the float32 weights: activations, and the copy that a library makes on reading


def needs_streaming(clip: UnloadedClip, section: ExportSection) -> bool:
    """Whether to export without loading: as the section says, else if the float32 model does not fit the free memory.

    Raises: RecipeError where that is asked for in a format that runs the whole model.
    """
    needed = _HEADROOM * sum(4 * torch.Size(clip.tensors.shape(name)).numel() for name in clip.tensors)
    is_asked = section.streamed if section.streamed is not None else needed > available_memory()
    if is_asked and section.format not in STREAMABLE:
        raise RecipeError(
            f"format = {section.format!r} runs the whole model, which takes about {needed / 1e9:.0f} GB of memory",
            where="export.format",
            expected=f"at most {available_memory() / 1e9:.0f} GB, or a format written tensor by tensor: "
            + ", ".join(STREAMABLE),
            fix="export on a larger machine, or set export.streamed = false to try",
        )
    return is_asked


def available_memory() -> float:
    """Bytes that can be had without swapping."""
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as file:
            line = next(line for line in file if line.startswith("MemAvailable:"))
        return 1024.0 * int(line.split()[1])
    except (OSError, StopIteration):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def export_unloaded(
    clip: UnloadedClip, section: ExportSection, dtype: torch.dtype, facts: CardFacts, target: Target
) -> Exported:
    """Write and verify `clip` in the section's format. Raises: as `export_streamed`."""
    prefix = {"image": "visual.", "text": "text.", None: ""}[section.tower]
    tensors: TensorMap = CastMap(tensors_below(clip.tensors, prefix), dtype)
    if section.format == "baai":
        tensors = baai_state(tensors, clip.config)
    layout = _layout(clip, section, facts, target)
    blocks = clip.config.depth if clip.config.is_eva and section.tower != "text" else 0
    return export_streamed(
        layout,
        tensors,
        blocks,
        _block_output(clip, _named_block(CastMap(clip.tensors, dtype))),
        lambda read: _block_output(clip, _exported_block(clip, section, read)),
        target,
    )


class LibraryMap(ReadBack):
    """A safetensors file through the library itself, opened anew for every tensor.

    The library maps the file into memory: what was read would count as this process's memory until it is closed. A
    file larger than the memory it may not map for torch at all; then it reads the header, and we the tensors.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ours: TensorMap | None = None
        try:
            self._shapes = self._read_header("pt")
        except RuntimeError as error:  # of torch's mapping: ENOMEM
            if "mmap" not in str(error):
                raise
            self._shapes = self._read_header("np")
            self._ours = SafetensorsMap(path)
            self.reader = "the format's library (its header) and evatool (the tensors: the file exceeds the memory)"

    def _read_header(self, framework: str) -> dict[str, tuple[int, ...]]:
        with safe_open(self._path, framework=framework) as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        if self._ours is not None:
            return self._ours[name]
        with safe_open(self._path, framework="pt") as file:
            return file.get_tensor(name)


class TorchMap(ReadBack):
    """A torch file through torch's restricted loader, mapped anew for every tensor, for the same reason."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self._open().items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._open()[name]

    def _open(self) -> dict[str, Tensor]:
        # A shared mapping is not charged to the process: one of a file larger than the memory is allowed.
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            return torch.load(self._path, weights_only=True, mmap=True)


def _layout(clip: UnloadedClip, section: ExportSection, facts: CardFacts, target: Target) -> StreamedFormat:
    write = partial(write_safetensors, metadata={"format": "pt"})
    how = (
        "read back by {}; every tensor has the same bits, and every block of the image tower gave the same output when "
        "it was built from the source and from the file"
    )
    match section.format:
        case "open_clip":
            description = open_clip_description(clip.config)
            configs: dict[str, Mapping[str, Any]] = {}
            if description.timm_config is not None:
                configs["config.json"] = description.timm_config
            configs["open_clip_config.json"] = open_clip_config(description, target.folder)
            card = partial(open_clip_card, description, facts, target)
            return StreamedFormat(
                "open_clip_model.safetensors",
                write,
                LibraryMap,
                configs,
                lambda d, reader: card(difference=d, how=how.format(reader)),
            )
        case "safetensors":
            table = clip.config.to_json()
            return StreamedFormat(
                "model.safetensors",
                write,
                LibraryMap,
                {"model_config.json": table},
                lambda d, reader: card_of(
                    facts, "safetensors", SAFETENSORS_NOTE, how.format(reader), d, target.tolerance
                ),
            )
        case _:
            return StreamedFormat(
                "model.pt",
                write_torch_archive,
                TorchMap,
                {"model_config.json": baai_config(clip.config)},
                lambda d, reader: card_of(facts, "pytorch", BAAI_NOTE, how.format(reader), d, target.tolerance),
            )


NamedBlock = Callable[[int], dict[str, Tensor]]
"""Number of a block -> its parameters under timm's names, without the block's own prefix."""


def _named_block(tensors: TensorMap) -> NamedBlock:
    def read(number: int) -> dict[str, Tensor]:
        prefix = f"{TOWER}blocks.{number}."
        return {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}

    return read


def _exported_block(clip: UnloadedClip, section: ExportSection, read: Mapping[str, Tensor]) -> NamedBlock:
    """As the format's readers find a block: open_clip by its names, BAAI's format through timm's filter."""
    if section.format != "baai":
        return lambda number: _named_block(_plain(read))(number)
    with torch.device("meta"):
        trunk = build_trunk(clip.config)

    def through_timm(number: int) -> dict[str, Tensor]:
        prefix = f"visual.blocks.{number}."
        block = {name.removeprefix(prefix): read[name] for name in read if name.startswith(prefix)}
        # the filter looks at these names to tell the layout
        state = {"visual.pos_embed": read["visual.pos_embed"]}
        state |= {f"visual.blocks.0.{name}": tensor for name, tensor in block.items()}
        named = checkpoint_filter_fn(state, trunk)
        return {n.removeprefix("blocks.0."): t for n, t in named.items() if n.startswith("blocks.0.")}

    return through_timm


def _plain(read: Mapping[str, Tensor]) -> TensorMap:
    assert isinstance(read, TensorMap), "safetensors are read through LibraryMap"
    return read


def _block_output(clip: UnloadedClip, parameters: NamedBlock) -> BlockOutput:
    """The output of one block at a time, built from `parameters`, in float32, for one fixed input."""

    @torch.no_grad()
    def run(number: int) -> Tensor:
        with torch.device("meta"):
            trunk = build_trunk(clip.config.with_depth(1))
        block = trunk.blocks[0]
        block.load_state_dict({name: t.float() for name, t in parameters(number).items()}, strict=True, assign=True)
        restore_buffers(block)
        rope = None
        if trunk.rope is not None:
            restore_buffers(trunk.rope)
            rope = trunk.rope.get_embed()
        tokens = 1 + clip.config.grid[0] * clip.config.grid[1]
        x = torch.randn(2, tokens, clip.config.width, generator=torch.Generator().manual_seed(number))
        return block.eval()(x, rope=rope)

    return run
