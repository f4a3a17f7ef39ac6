"""Freezing a tower, whole or in part, as in LiT (arXiv 2111.07991). Its projection always learns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import Tensor

from evatool.core.errors import RecipeError
from evatool.optim.param_groups import layer_of, tower_of

PROJECTIONS = (
    "visual.trunk.head.",
    "visual.head.",
    "visual.proj",
    "text.text_projection",
)
"""Where a tower's projection to the shared embedding lives: a timm head, open_clip's, or a matrix."""


def lock(
    named_parameters: Iterable[tuple[str, Tensor]], tower: Literal["visual", "text"], layers: int | str, depth: int
) -> list[str]:
    """Freeze a tower from its input up; returns the names that were frozen.

    Args:
        layers: "all" for everything but the projection; else the number of blocks that are frozen, the embeddings with
            them (0: only those).
        depth: blocks of the tower.
    Raises: RecipeError where the tower has fewer blocks, or nothing was frozen.
    """
    if layers != "all" and int(layers) > depth:
        raise RecipeError(
            f"model.lock.{tower} = {layers}, but the {tower} tower has {depth} blocks",
            where=f"model.lock.{tower}",
            expected=f'a number up to {depth}, or "all" for the norm behind them too',
        )
    frozen = []
    for name, param in named_parameters:
        if tower_of(name) != tower or any(part in name for part in PROJECTIONS):
            continue
        if layers == "all" or layer_of(name, depth) <= int(layers):
            param.requires_grad_(False)
            frozen.append(name)
    if not frozen:
        raise RecipeError(f"model.lock.{tower} = {layers!r} freezes nothing", where=f"model.lock.{tower}")
    return frozen
