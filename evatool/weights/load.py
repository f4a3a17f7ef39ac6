"""The one way from any source to a model: find its weights, name its configuration, check them, read them.

    find_clip(source)  = read_weights -> one configuration -> model on the meta device -> fit_clip_weights
    .load(dtype)       = the tensors, one at a time, into the model

Weights of another model start a tower (`init_image_tower`, `init_text_tower`); `load_clip_weights` and
`load_mim_weights` fill a model that is there already.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from open_clip import CustomTextCLIP
from torch import Tensor, nn

from evatool.core.errors import CheckpointError
from evatool.formats.safetensors import dtype_of, shape_of
from evatool.model.clip import PROJECTION, TOWER, build_clip
from evatool.model.config import ModelConfig
from evatool.model.mae import MaeModel
from evatool.model.mim import MimModel
from evatool.model.open_clip_architecture import kept_tensors
from evatool.model.presets import resolve_config
from evatool.model.registration import register
from evatool.weights.fit import SCALARS, FittedMap, FittedWeights, LoadReport, fit_weights
from evatool.weights.key_mapping import canonical_state, has_vit_names, mae_state, open_clip_state
from evatool.weights.resize import PatchResize
from evatool.weights.source import SourceWeights, read_weights

log = logging.getLogger(__name__)

# What starts fresh when a tower comes from another model (docs/reference/eva.md#clip-settings and
# #start-from-other-models). Patterns of our names.
IMAGE_PROJECTION = (PROJECTION, f"{TOWER}head.*")
ATTENTION_NORMS = f"{TOWER}blocks.*.attn.norm.*"
TEXT_PROJECTION = ("text.text_projection",)
DEFAULT_FRESH = (*IMAGE_PROJECTION, ATTENTION_NORMS, *TEXT_PROJECTION)

Sources = dict[str, Callable[[], Tensor]]
"""By parameter name, what reads its tensor, in its shape."""


# ------------------------------------------------------------------------------------------------- a source, whole


@dataclass
class UnloadedClip:
    """A CLIP model on disk: checked against its configuration, and not read yet."""

    fitted: FittedWeights
    config: ModelConfig
    source: str
    """The file or folder that the tensors come from."""
    stored_dtype: torch.dtype
    """Dtype of the weights there."""
    skeleton: CustomTextCLIP
    """The model on the meta device."""

    @property
    def tensors(self) -> FittedMap:
        """Every parameter under our names, resized where that was asked for, read when asked for."""
        return self.fitted.tensors

    def load(self, dtype: torch.dtype = torch.float32) -> CustomTextCLIP:
        """The model with its weights in memory, in `dtype`; the temperature is float32."""
        clip = copy.deepcopy(self.skeleton)
        report = self.fitted.fill(clip, dtype=dtype)
        if self.config.open_clip is not None:
            cast_floats(clip, dtype)
        log.log(logging.INFO if report.resized else logging.DEBUG, "%s: %s", self.source, report)
        return clip


def find_clip(
    source: str | Path,
    model_config: ModelConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    image_size: int | None = None,
    patch_size: int | None = None,
    patch_resize: PatchResize = "bicubic",
    weights: str | None = None,
) -> UnloadedClip:
    """The CLIP model that is on disk at `source`, without its weights in memory; arguments as `load_clip`'s.

    Raises: CheckpointError if the weights are missing, damaged or of another model.
    """
    register()
    found = read_weights(source, weights)
    config = only_config(found) if model_config is None else _given_config(model_config, found)
    config = clip_only(config.with_sides(image_size, patch_size), found.source)
    if config.open_clip is not None:
        with _suggesting_presets(found, config):
            return _find_open_clip(found, config)
    state = canonical_state(found.state, found.source)
    if "logit_bias" in state:  # only the weights of a model that was trained with the sigmoid loss have it
        config = config.with_logit_bias(True)
    with torch.device("meta"):
        skeleton = build_clip(config)
    with _suggesting_presets(found, config):
        fitted = fit_clip_weights(skeleton, state, where=found.source, patch_resize=patch_resize)
    return UnloadedClip(fitted, config, found.source, _stored_dtype(found), skeleton)


def _find_open_clip(found: SourceWeights, config: ModelConfig) -> UnloadedClip:
    """A model in open_clip's words: in memory at once, since its towers hold buffers of all kinds."""
    skeleton = build_clip(config)
    fitted = fit_open_clip(skeleton, found.state, found.source)
    return UnloadedClip(fitted, config, found.source, _stored_dtype(found), skeleton)


def _given_config(model_config: ModelConfig | Mapping[str, Any] | str | Path, found: SourceWeights) -> ModelConfig:
    """The configuration that was given; its input is the one that the source says, where it says one itself."""
    config = resolve_config(model_config, is_vit=has_vit_names(found.state))
    said = found.said.input
    return config if said is None or not config.input.is_default else replace(config, input=said)


def cast_floats(clip: nn.Module, dtype: torch.dtype) -> None:
    """Parameters and buffers in `dtype`, the temperature and bias left as they are."""
    if dtype != torch.float32:
        kept = {name: parameter.data for name, parameter in clip.named_parameters() if name in SCALARS}
        clip.to(dtype)
        for name, tensor in kept.items():
            clip.get_parameter(name).data = tensor


def clip_only(config: ModelConfig, where: str) -> ModelConfig:
    """`config` itself. Raises: CheckpointError where it is of a MIM model."""
    if config.task != "clip":
        raise CheckpointError(
            f"{config.name} is a MIM model: it has an image tower and no text tower",
            where=where,
            expected="a CLIP model",
            fix="train a CLIP model from it: evatool train-clip with model.init.kind = 'image-tower'",
        )
    return config


def only_config(weights: SourceWeights) -> ModelConfig:
    """The configuration that a source has. Raises: CheckpointError where nothing tells which model it is."""
    if not weights.configs:
        raise CheckpointError(
            "no preset has the shapes of these weights",
            where=weights.source,
            fix="name the model: model_config = a JSON file with embed_dim, vision_cfg and text_cfg, or a preset",
        )
    if len(weights.configs) > 1:
        raise CheckpointError(
            f"{len(weights.configs)} presets have the shapes of these weights, and nothing beside them tells which",
            where=weights.source,
            fix="name one: model_config = "
            + " or ".join(f"{c.name} ({'QuickGELU' if c.quick_gelu else 'GELU'})" for c in weights.configs),
        )
    return weights.configs[0]


@contextmanager
def _suggesting_presets(weights: SourceWeights, config: ModelConfig) -> Iterator[None]:
    """A refusal of the weights also says which presets they would fit."""
    try:
        yield
    except CheckpointError as error:
        if weights.configs and config not in weights.configs:
            error.fix = f"these weights fit the preset {' or '.join(c.name for c in weights.configs)}"
        raise


def _stored_dtype(weights: SourceWeights) -> torch.dtype:
    """The dtype of the matrices: the temperature, and some norms, may be kept in a wider one."""
    matrix = next(name for name in weights.state if len(shape_of(weights.state, name)) > 1)
    return dtype_of(weights.state, matrix)


# --------------------------------------------------------------------------------------- all weights of a model


def fit_clip_weights(
    clip: CustomTextCLIP, state: Mapping[str, Tensor], *, where: str, patch_resize: PatchResize = "bicubic"
) -> FittedWeights:
    """All weights of a CLIP model, checked against `clip`, which may be on the meta device.

    Raises: CheckpointError unless every parameter has its tensor and every tensor its place.
    """
    source = canonical_state(state, where)
    return fit_weights(clip, source, take=set(source), where=where, patch_resize=patch_resize)


def fit_open_clip(clip: nn.Module, state: Mapping[str, Tensor], where: str) -> FittedWeights:
    """All weights and kept buffers of a model in open_clip's words. Raises: CheckpointError as `fit_clip_weights`."""
    source = open_clip_state(state)
    return fit_weights(clip, source, take=set(source), where=where, named=list(kept_tensors(clip)))


def load_clip_weights(
    clip: CustomTextCLIP,
    state: Mapping[str, Tensor],
    *,
    where: str = "state dict",
    patch_resize: PatchResize = "bicubic",
    dtype: torch.dtype = torch.float32,
) -> LoadReport:
    """Give `clip` all weights of a CLIP model, in any naming that `canonical_state` knows; returns what was done.

    Image positions and the patch kernel are resized to `clip`'s. Where anything does not fit, `clip` is unchanged.

    Args:
        where: what errors call the source.
        patch_resize: how a patch kernel of another size is resized.
        dtype: of parameters that are on the meta device and get their memory here; the temperature's is float32.
    Raises: CheckpointError unless every parameter has its tensor and every tensor its place.
    """
    return fit_clip_weights(clip, state, where=where, patch_resize=patch_resize).fill(clip, dtype=dtype)


def load_mim_weights(
    model: MimModel | MaeModel, state: Mapping[str, Tensor], *, where: str = "state dict"
) -> LoadReport:
    """Give a MIM model all its weights from our checkpoint or a file of BAAI's; returns what was done.

    Raises: CheckpointError as `load_clip_weights`.
    """
    if isinstance(model, MaeModel):
        ours = mae_state(state)
    else:
        source = canonical_state(state, where)
        plain = {name: f"visual.{name.removeprefix(TOWER)}" for name in source if name.startswith(TOWER)}
        ours = source.renamed(plain)
    return fit_weights(model, ours, take=set(ours), where=where).fill(model)


# ----------------------------------------------------------------------------------- a tower from another model


def fit_image_tower(
    clip: CustomTextCLIP,
    state: Mapping[str, Tensor],
    *,
    where: str,
    may_be_fresh: Sequence[str] | None = None,
    patch_resize: PatchResize = "bicubic",
) -> FittedWeights:
    """The image tower of a MIM or CLIP model, checked against `clip`'s; arguments as `init_image_tower`'s."""
    source = canonical_state(state, where)
    if may_be_fresh is None:
        has_norms = any(fnmatchcase(name, ATTENTION_NORMS) for name in source)
        may_be_fresh = IMAGE_PROJECTION if has_norms else (*IMAGE_PROJECTION, ATTENTION_NORMS)
    return _fit_tower(clip, source, "visual.", may_be_fresh, where, patch_resize)


def fit_text_tower(
    clip: CustomTextCLIP, state: Mapping[str, Tensor], *, where: str, may_be_fresh: Sequence[str] | None = None
) -> FittedWeights:
    """The text tower of a CLIP model, checked against `clip`'s; arguments as `init_text_tower`'s."""
    fresh = TEXT_PROJECTION if may_be_fresh is None else may_be_fresh
    return _fit_tower(clip, canonical_state(state, where), "text.", fresh, where, "bicubic")


def init_image_tower(
    clip: CustomTextCLIP,
    state: Mapping[str, Tensor],
    *,
    where: str = "state dict",
    may_be_fresh: Sequence[str] | None = None,
    patch_resize: PatchResize = "bicubic",
) -> LoadReport:
    """Give `clip` the image tower of a MIM or CLIP model, in any naming that `canonical_state` knows.

    Positions and the patch kernel are resized to `clip`'s. Where anything does not fit, `clip` is unchanged.

    Args:
        where: what errors call the source.
        may_be_fresh: patterns (`*` for anything) of our names that keep their first weights. By default the projection
            and, where the source has none of them, the norms inside the attention (EVA-02's MIM models).
        patch_resize: how a patch kernel of another size is resized.
    Raises: CheckpointError for what else is missing, left over or of another shape.
    """
    fitted = fit_image_tower(clip, state, where=where, may_be_fresh=may_be_fresh, patch_resize=patch_resize)
    return fitted.fill(clip)


def init_text_tower(
    clip: CustomTextCLIP,
    state: Mapping[str, Tensor],
    *,
    where: str = "state dict",
    may_be_fresh: Sequence[str] | None = None,
) -> LoadReport:
    """Give `clip` the text tower of a CLIP model, in any naming that `canonical_state` knows.

    By default the projection keeps its first weights, as in every EVA-CLIP (docs/reference/eva.md#clip-settings).
    Arguments and errors are those of `init_image_tower`.
    """
    return fit_text_tower(clip, state, where=where, may_be_fresh=may_be_fresh).fill(clip)


def _fit_tower(
    clip: CustomTextCLIP,
    source: Mapping[str, Tensor],
    prefix: str,
    may_be_fresh: Sequence[str],
    where: str,
    patch_resize: PatchResize,
) -> FittedWeights:
    """Take what lies below `prefix`, less what stays fresh: a fresh parameter is not taken even where it fits."""
    ours = [name for name, _ in clip.named_parameters() if name.startswith(prefix)]
    without_effect = [p for p in may_be_fresh if p not in DEFAULT_FRESH and not any(fnmatchcase(n, p) for n in ours)]
    if without_effect:
        raise CheckpointError(
            f"no parameter of the model matches {', '.join(without_effect)}",
            where=where,
            expected=f"patterns of names such as {', '.join(ours[:3])}",
        )
    stays_fresh = {name for name in source if any(fnmatchcase(name, pattern) for pattern in may_be_fresh)}
    take = {name for name in source if name.startswith(prefix)} - stays_fresh
    fitted = fit_weights(
        clip,
        source,
        take=take,
        only=lambda name: name.startswith(prefix),
        may_be_fresh=may_be_fresh,
        where=where,
        patch_resize=patch_resize,
    )
    fitted.report.unused = [name for name in source if name not in take]
    return fitted
