"""Frozen image models of timm that give a grid of patch features, and features carried to another grid."""

# B batch, S input side in pixels, N patches, T channels of the features

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evatool.core.errors import CheckpointError, RecipeError
from evatool.core.image_norm import normalize_images
from evatool.formats.fingerprint import weights_fingerprint
from evatool.formats.safetensors import shape_of
from evatool.weights.open import open_weights

log = logging.getLogger(__name__)


class TimmTeacher:
    """Patch features of one layer of a timm model, in eval mode, without gradient.

    Attributes:
        image_size: input side in pixels.
        grid, embed_dim: patches (rows, columns) and channels of the layer.
    """

    def __init__(self, name: str, model: nn.Module, layer: int, image_size: int) -> None:
        self.name, self.model, self.layer, self.image_size = name, model, layer, image_size
        settings: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        self.mean, self.std = tuple(settings["mean"]), tuple(settings["std"])
        device = next(model.parameters()).device
        probe = self._features(torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=device))
        self.embed_dim = int(probe.shape[1])
        self.grid = (int(probe.shape[2]), int(probe.shape[3]))

    @torch.no_grad()
    def visual_tokens(self, image: Tensor) -> Tensor:
        """Patch features (B, N, T) in float32 of pictures (B, 3, S, S) uint8, normalised as the model was trained."""
        return self._features(image).flatten(2).transpose(1, 2).float()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of architecture, layer, pixel statistics and all weights."""
        about = repr((self.name, self.layer, self.mean, self.std))
        return weights_fingerprint(about, sorted(self.model.state_dict().items()))

    @torch.no_grad()
    def _features(self, image: Tensor) -> Tensor:
        """(B, T, rows, columns); the model's last norm is applied where it has one."""
        pixels = normalize_images(image, self.mean, self.std, next(self.model.parameters()).dtype)
        found = self.model.forward_intermediates(  # type: ignore[operator]
            pixels, indices=[self.layer], norm=True, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        features: Tensor = found[0]
        return features


def load_timm_teacher(
    name: str,
    *,
    weights: Path | None = None,
    layer: int | None = None,
    image_size: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TimmTeacher:
    """A timm model as a teacher of patch features.

    Args:
        name: as `timm.create_model` takes it.
        weights: state dict under timm's names, or of another library's model with the same tensors in the same order.
            Random weights, with a warning, when None.
        layer: of those that `forward_intermediates` counts (blocks of a transformer, stages of a convolutional
            network), from 0 or, where negative, from the end; the last when None.
        image_size: input side in pixels; the model's own when None.
        dtype: of weights and arithmetic.
    Raises: RecipeError where the model is unknown or gives no grid; CheckpointError where the weights do not fit.
    """
    try:
        model = timm.create_model(name, pretrained=False)
    except RuntimeError as error:
        near = timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:5]
        raise RecipeError(
            f"timm has no model {name!r}",
            where="teacher.model",
            expected="timm/ and a name that timm.list_models() shows" + (f": {', '.join(near)}" if near else ""),
        ) from error
    if not hasattr(model, "forward_intermediates"):
        raise RecipeError(f"timm's {name} gives no patch features", where="teacher.model", fix="choose another model")
    if weights is None:
        log.warning("timm/%s: no teacher.weights are given, its weights are random", name)
    else:
        _load(model, weights)
    own = int(model.pretrained_cfg["input_size"][-1])
    size = own if image_size is None else image_size
    if size != own and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=size)
    model = model.to(device, dtype).eval().requires_grad_(False)
    try:
        return TimmTeacher(name, model, -1 if layer is None else layer, size)
    except (AssertionError, IndexError, ValueError, RuntimeError) as error:
        words = " ".join(str(error).split()) or type(error).__name__
        raise RecipeError(
            f"timm's {name} gives no features of layer {layer} for pictures of {size} pixels: {words}",
            where="teacher.layer and teacher.image_size",
            expected=f"a layer that its forward_intermediates knows, and by default {own} pixels",
        ) from error


def _load(model: nn.Module, path: Path) -> None:
    """Fill the model by name; where names are of another library's, in order, if every shape fits."""
    found, own = open_weights(path), model.state_dict()
    if found.keys() == own.keys():
        pairs = {name: name for name in own}
    else:
        theirs, ours = _counted(found), _counted(own)
        shapes = [shape_of(found, name) for name in theirs], [tuple(own[name].shape) for name in ours]
        if shapes[0] != shapes[1]:
            raise _do_not_fit(path, model, found, own, theirs, ours)
        pairs = dict(zip(ours, theirs, strict=True))
        log.info("%s: %d tensors under other names, taken in order", path, len(pairs))
    model.load_state_dict({name: found[source] for name, source in pairs.items()}, strict=False)


def _counted(state: Mapping[str, Tensor]) -> list[str]:
    """Names in order, without batch norms' counters, which no forward pass reads."""
    return [name for name in state if not name.endswith("num_batches_tracked")]


def _do_not_fit(
    path: Path,
    model: nn.Module,
    found: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    theirs: list[str],
    ours: list[str],
) -> CheckpointError:
    mismatch = next(
        (
            f"{a} {shape_of(found, a)} stands where {b} {tuple(own[b].shape)} is needed"
            for a, b in zip(theirs, ours, strict=False)
            if shape_of(found, a) != tuple(own[b].shape)
        ),
        "one has more than the other",
    )
    return CheckpointError(
        f"the weights are not those of this {type(model).__name__}: {len(theirs)} tensors for {len(ours)}; {mismatch}",
        where=str(path),
        expected="a state dict of the timm model that teacher.model names",
        fix="correct teacher.model or teacher.weights",
    )


def resize_grid(tokens: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Patch features (B, N, T) of `grid` on the grid `wanted`: bilinear over the same picture, averaged where it has
    fewer patches; the same tensor where the grids are equal."""
    if grid == wanted:
        return tokens
    image = tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)
    image = F.interpolate(image, size=wanted, mode="bilinear", align_corners=False, antialias=True)
    return image.flatten(2).transpose(1, 2)
