"""The parameters of an optimiser group and what is particular to them. No torch at run time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Tower = Literal["visual", "text", "other"]
"""The part of a model whose `[optim]` section a parameter follows."""


@dataclass(frozen=True)
class ParamOwner:
    """Where a parameter that belongs to no tower of the model learns: a loss's own, such as a prediction head."""

    tower: Tower = "other"
    """The section of `[optim]` whose learning rate and weight decay it has."""
    lr_scale: float = 1.0
    """A factor on that learning rate."""


@dataclass
class ParamGroup:
    """Parameters that share a learning rate and a weight decay; `optim` makes the groups, an engine steps them."""

    name: str
    """tower/layer/decay, for instance "visual/layer_03/decay"."""
    tower: str
    """The part of the model that the parameters belong to: "visual", "text" or "other"."""
    layer: int | None
    """0 the embeddings, i + 1 block i, depth + 1 the head; None where a tower has no layer decay."""
    lr: float
    """The tower's peak learning rate."""
    lr_scale: float
    """The factor of layer decay, and of the parameters' owner, on it."""
    weight_decay: float
    params: list[Tensor]
    """The parameters; where an engine shards them, this rank's shards."""
    param_names: list[str]
    """Their names in the objective's `named_parameters()`, in the order of `params`."""
