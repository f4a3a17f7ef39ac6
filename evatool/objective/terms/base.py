"""The contract of one loss among those that a CLIP model learns from."""

# B this rank's samples, E embedding

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from evatool.core.batch import Batch, LossDict
from evatool.core.param_group import ParamOwner, Tower
from evatool.core.step import StepContext
from evatool.objective.base import Features
from evatool.recipe.schema.distill import Weight, weight_at

TermLoss = tuple[Tensor, LossDict]
"""A loss with gradient, and what is only logged beside it."""


@dataclass(frozen=True)
class OwnPart:
    """A parameter, layer or buffer of a term, and where its parameters learn."""

    value: nn.Parameter | nn.Module | Tensor
    owner: ParamOwner


class LossTerm(ABC):
    """One loss: what it needs, what it is, what it counts for, and what is learned for it alone.

    A step calls, in this order, `encode` (with gradient), `targets` (without) and `loss`. A batch that is too large
    for the device goes through `encode` and `targets` in micro-batches, and through `loss` once, so that a term is
    exact under micro-batches as long as `encode` and `targets` treat each sample by itself and only `encode` uses
    parameters. It is exact on several ranks as long as the mean over ranks of `loss` is the loss of the global batch.

    Args:
        name: of the loss in the log, where it is not the only one.
        weight: factor on the loss: a number, or `((samples_seen, weight), ...)`, linear between the points.
        factor: another one that stays, such as that of a teacher.
        weight_name: under which a weight that changes is logged; `name` when absent.
    Attributes:
        parameter_bounds: (low, high) of parameters by the objective's names, held by the engine after every step.
        starts_at_ln_batch: the loss is ln(global batch size) while the features tell nothing apart.
        batch_fields: fields of the batch that must be there.
    """

    parameter_bounds: Mapping[str, tuple[float, float]] = MappingProxyType({})
    starts_at_ln_batch: bool = False
    batch_fields: tuple[str, ...] = ()

    def __init__(self, name: str, weight: Weight = 1.0, *, factor: float = 1.0, weight_name: str | None = None) -> None:
        self.name, self.weight, self.factor = name, weight, factor
        self.weight_name = name if weight_name is None else weight_name
        self._parts: dict[str, OwnPart] = {}
        self._objective: tuple[nn.Module, ...] = ()  # in a tuple, as elsewhere: it is not part of the term

    # ------------------------------------------------------------------------------------------- for a subclass

    def prepare(self, model: nn.Module) -> None:  # noqa: B027  most terms have nothing to do here
        """Set what the term needs of the model before it learns, such as its first temperature; called once."""

    def encode(self, model: nn.Module, batch: Batch, features: Features) -> Features:
        """Features of each sample that the loss needs beside those that are there, and learned scalars.

        Args:
            model: the CLIP model.
            batch: on the device; images are uint8.
            features: so far: `image` and `text` (B, E) of unit length, `scale` (the exponentiated temperature, a
                scalar), and what the terms before this one added.
        Returns: new ones by names of their own: (B, ...) tensors or scalars, with gradient.
        """
        return {}

    def targets(self, batch: Batch, found: Features) -> Features:
        """What the features are compared with, such as a teacher's features: (B, ...) tensors without gradient.

        Args:
            found: targets of the terms before this one; what is there (of the same teacher) need not be made again.
        """
        return {}

    @abstractmethod
    def loss(self, features: Features, batch: Batch) -> TermLoss:
        """This rank's loss, unweighted; all ranks call it together, so it may use collectives.

        Args:
            features: all features and targets of all terms, by name.
            batch: only its `caption_id` may be read here.
        Returns: a scalar float32 or wider with gradient, and scalars for the log.
        """

    def add_part(
        self, name: str, value: nn.Parameter | nn.Module | Tensor, tower: Tower = "other", lr_scale: float = 1.0
    ) -> None:
        """Declare, in `__init__`, what is learned (or, a plain tensor, kept) for this term alone.

        It becomes the objective's under this name, beside `model`: engines shard it, optimisers step it, checkpoints
        keep it in `extra.safetensors`, and exports leave it out, since the model is complete without it. Terms that
        share a layer declare the same one under the same name.

        Args:
            tower: the `[optim]` section that its parameters follow.
            lr_scale: a factor on that section's learning rate.
        """
        self._parts[name] = OwnPart(value, ParamOwner(tower, lr_scale))

    def part(self, name: str) -> Any:
        """The part of this name as it is now: engines put their own tensors in the places of parameters."""
        return getattr(self._objective[0], name) if self._objective else self._parts[name].value

    # ------------------------------------------------------------------------------------------ for the objective

    def attach(self, objective: nn.Module) -> Mapping[str, OwnPart]:
        """Hand the parts over to an objective; from here on `part` looks there."""
        assert not self._objective, f"the term {self.name} is part of an objective already"
        parts, self._parts, self._objective = self._parts, {}, (objective,)
        return parts

    def weight_at(self, step: StepContext) -> float:
        """The factor on the loss at this step."""
        return self.factor * weight_at(self.weight, step.samples_seen)
