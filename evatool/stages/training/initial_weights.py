"""Initial weights of a CLIP model, from what `[model.init]` names."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from open_clip import CustomTextCLIP
from torch import Tensor

from evatool.core.errors import CheckpointError, RecipeError
from evatool.model.config import ModelConfig
from evatool.recipe.schema import (
    ClipModelSection,
    ImageTowerInit,
    SelectSection,
    TowersInit,
    WholeModelInit,
)
from evatool.weights.fit import FittedWeights
from evatool.weights.key_mapping import canonical_state
from evatool.weights.load import Sources, fit_clip_weights, fit_image_tower, fit_text_tower
from evatool.weights.select import describe_selection, select_weights
from evatool.weights.source import SourceWeights, read_weights

log = logging.getLogger(__name__)


def init_clip(
    clip: CustomTextCLIP, config: ModelConfig, section: ClipModelSection, sources: Sources | None = None
) -> None:
    """Give `clip` what `[model.init]` names.

    Args:
        config: of `clip`.
        sources: where it is given, no tensor is read; how to read each is noted there.
    Raises: CheckpointError where the source's weights do not fit.
    """
    for path in _sources(section):
        _refuse_other_statistics(read_weights(path), config, path)
    for what, path, fitted in _fitted(clip, config, section):
        if sources is None:
            fitted.fill(clip)
        else:
            sources.update(fitted.readers())
        log.info("%s from %s: %s", what, path, fitted.report)


def _fitted(
    clip: CustomTextCLIP, config: ModelConfig, section: ClipModelSection
) -> Iterator[tuple[str, Path, FittedWeights]]:
    """Each part that is taken, in words, the path it is from, and its tensors checked against `clip`."""
    match section.init:
        case ImageTowerInit(path=path):
            yield "image tower", path, fit_image_tower(clip, read_weights(path).state, where=str(path))
        case TowersInit(image=image, text=text):
            if image is not None:
                state = _read(image.path, image.select, config, ("visual",))
                fresh, patch_resize = image.fresh, image.patch_resize
                fitted = fit_image_tower(
                    clip, state, where=str(image.path), may_be_fresh=fresh, patch_resize=patch_resize
                )
                yield "image tower", image.path, fitted
            if text is not None:
                state = _read(text.path, text.select, config, ("text",))
                fitted = fit_text_tower(clip, state, where=str(text.path), may_be_fresh=text.fresh)
                yield "text tower", text.path, fitted
        case WholeModelInit(path=path, select=select):
            state = _read(path, select, config, ("visual", "text"))
            yield "all weights", path, fit_clip_weights(clip, _without_bias(state, path), where=str(path))


def _sources(section: ClipModelSection) -> list[Path]:
    """What the image tower's first weights are read from."""
    match section.init:
        case TowersInit(image=image):
            return [] if image is None else [image.path]
        case ImageTowerInit(path=path) | WholeModelInit(path=path):
            return [path]
    return []


def _refuse_other_statistics(weights: SourceWeights, config: ModelConfig, path: Path) -> None:
    """Raises: RecipeError where the weights are of a model whose images were normalised in another way."""
    for theirs in weights.configs[:1]:
        if (theirs.input.mean, theirs.input.std) != (config.input.mean, config.input.std):
            mean, std = list(theirs.input.mean), list(theirs.input.std)
            raise RecipeError(
                f"the model at {path} was trained on images of mean {mean} and standard deviation {std}, and this one "
                f"gets {list(config.input.mean)} and {list(config.input.std)}",
                where="model.init",
                expected="the same images as before",
                fix=f"--set model.image_mean='{mean}' --set model.image_std='{std}'",
            )


def _without_bias(state: Mapping[str, Tensor], path: Path) -> Mapping[str, Tensor]:
    """The weights less a sigmoid model's bias, which belongs to the objective."""
    known = canonical_state(state, str(path))
    if "logit_bias" not in known:
        return known
    bias, scale = float(known["logit_bias"]), float(known["logit_scale"].float().exp())
    log.info("%s: its logit_bias %.4g (at scale %.4g) is not taken: the objective has its own", path, bias, scale)
    return known.without("logit_bias")


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
