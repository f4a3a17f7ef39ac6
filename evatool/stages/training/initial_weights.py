"""Initial weights of a CLIP model, from what `[model.init]` names."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from open_clip import CustomTextCLIP
from torch import Tensor

from evatool.core.errors import CheckpointError
from evatool.inference.loaded_clip import read_weights
from evatool.model.config import ModelConfig
from evatool.recipe.schema import (
    ClipModelSection,
    ImageTowerInit,
    ImageTowerSource,
    SelectSection,
    TextTowerSource,
    TowersInit,
    WholeModelInit,
)
from evatool.weights.load import Sources, init_image_tower, init_text_tower, load_clip_weights
from evatool.weights.select import describe_selection, select_weights

log = logging.getLogger(__name__)


def init_clip(
    clip: CustomTextCLIP, config: ModelConfig, section: ClipModelSection, sources: Sources | None = None
) -> None:
    """Give `clip` what `[model.init]` names.

    Args:
        config: of `clip`.
        sources: where it is given, nothing is read but noted there.
    Raises: CheckpointError where the source's weights do not fit.
    """
    match section.init:
        case ImageTowerInit(path=path):
            report = init_image_tower(clip, read_weights(path).state, where=str(path), sources=sources)
            log.info("image tower from %s: %s", path, report)
        case TowersInit(image=image, text=text):
            _init_towers(clip, config, image, text, sources)
        case WholeModelInit(path=path, select=select):
            state = _read(path, select, config, ("visual", "text"))
            report = load_clip_weights(clip, state, where=str(path), sources=sources)
            log.info("all weights from %s: %s", path, report)


def _init_towers(
    clip: CustomTextCLIP,
    config: ModelConfig,
    image: ImageTowerSource | None,
    text: TextTowerSource | None,
    sources: Sources | None,
) -> None:
    if image is not None:
        report = init_image_tower(
            clip,
            _read(image.path, image.select, config, ("visual",)),
            where=str(image.path),
            may_be_fresh=image.fresh,
            patch_resize=image.patch_resize,
            sources=sources,
        )
        log.info("image tower from %s: %s", image.path, report)
    if text is not None:
        state = _read(text.path, text.select, config, ("text",))
        report = init_text_tower(clip, state, where=str(text.path), may_be_fresh=text.fresh, sources=sources)
        log.info("text tower from %s: %s", text.path, report)


def _read(
    path: Path, select: SelectSection | None, config: ModelConfig, towers: tuple[str, ...]
) -> Mapping[str, Tensor]:
    weights = read_weights(path)
    if select is None:
        return weights.state
    if not weights.configs:
        raise CheckpointError(
            "no preset has the shapes of these weights, so their layers and heads are not known",
            where=str(path),
            fix="leave out `select` where the shapes are the model's own",
        )
    # Where several presets have these shapes, they differ in the activation or the name alone.
    source = next((c for c in weights.configs if c.quick_gelu == config.quick_gelu), weights.configs[0])
    log.info("%s", describe_selection(source, config, towers, select.layers))
    return select_weights(
        weights.state,
        source,
        config,
        towers=towers,
        layers=select.layers,
        channels=select.channels,
        where=str(path),
    )
