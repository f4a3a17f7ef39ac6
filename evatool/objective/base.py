"""The contract of every objective: a batch in, named losses out, and how a batch too large for the device is split.

A subclass says by its base class how one optimiser step's batch may go through it in parts:

- `FeatureObjective`, features first: a loss between the samples of a batch needs all of them at once, so the features
  of every part are made first, then the loss once, then each part again with its features' gradients (GradCache).
- `SumObjective`, sums: a mean over samples or patches is the weighted sum of its parts' means.
- `Objective` itself: the batch is taken whole.

Source: GradCache (arXiv 2101.06983).
"""

# B samples of a batch

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

from evatool.core.batch import Batch, LossDict
from evatool.core.param_group import ParamOwner
from evatool.core.step import StepContext

Features = dict[str, Tensor]
"""By name: (B, ...) tensors with one row a sample, and scalars such as the temperature that all samples share."""

START = StepContext()
"""The first step of a run: what an objective assumes where it is called without a step."""


class Objective(nn.Module, ABC):
    """Turns a batch into losses; it never steps, scales, clips or logs.

    Attributes:
        parameter_bounds: (low, high) of parameters by their names here; the engine holds them there after every step.
        chance_loss: name of the logged loss that is ln(global batch size) while the features tell nothing apart; None
            if there is none. A run watches it and says so where it does not move.
    """

    parameter_bounds: Mapping[str, tuple[float, float]] = MappingProxyType({})
    chance_loss: str | None = None

    @abstractmethod
    def forward(self, batch: Batch, step: StepContext = START) -> LossDict:
        """Losses of this rank's samples; every rank must call it together.

        Args:
            batch: on this rank's device.
            step: where the run stands; schedules of losses follow `step.samples_seen`.
        Returns: scalars with `"loss"` among them, the one to minimise, whose mean over ranks is that of the global
            batch; the others are only logged, each as a mean over ranks.
        """

    def parameter_owners(self) -> dict[str, ParamOwner]:
        """Where each parameter outside `model` learns, by its name here; those of the model go by its towers."""
        return {}

    def changing_weights(self, step: StepContext) -> dict[str, float]:
        """Weights of losses that are not the same over the whole run, by the loss's name, as they are at this step."""
        return {}


class SumObjective(Objective):
    """An objective that is a mean over samples or patches, so that its parts' losses add up with known weights."""

    @abstractmethod
    def shares(self, batches: Sequence[Batch]) -> list[float]:
        """The weight of each part in the loss of the whole batch; together they are 1."""


class FeatureObjective(Objective):
    """An objective that compares the samples of a batch, in three parts of which only `encode` uses parameters."""

    @abstractmethod
    def encode(self, batch: Batch) -> Features:
        """Features of each sample and the learned scalars, with gradient; no collective is called."""

    def targets(self, batch: Batch) -> Features:
        """Features without gradient that the model's are compared with, such as a teacher's; none by default."""
        return {}

    @abstractmethod
    def losses(self, features: Features, batch: Batch, step: StepContext = START) -> LossDict:
        """Losses of this rank's samples against the global batch; all ranks must call it together.

        Args:
            features: those of `encode` and `targets` together.
            batch: the same samples, of which only `caption_id` may be read: what else a loss needs is a target.
            step: where the run stands.
        """

    def forward(
        self,
        batch: Batch,
        step: StepContext = START,
        part: Literal["loss", "features", "encoding"] = "loss",
        gradients: Mapping[str, Tensor] | None = None,
    ) -> LossDict:
        """All three parts, or some; through one method, since engines watch a module's `forward`.

        Args:
            part: "loss" for the losses of the batch, "features" for `encode` and `targets`, "encoding" for `encode`.
            gradients: with "encoding", of the loss with respect to each feature: what comes back is `{"loss"}`, whose
                gradient is the loss's own by way of these samples. Scalars that are left out get no gradient.
        """
        if part == "loss":
            return self.losses(self.encode(batch) | self.targets(batch), batch, step)
        encoded = self.encode(batch)
        if part == "features":
            return encoded | self.targets(batch)
        return encoded if gradients is None else {"loss": surrogate_loss(encoded, gradients)}


def surrogate_loss(features: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Tensor:
    """A scalar whose gradient with respect to the features is `gradients`, and 0 for those without one.

    With L the loss and g_k = dL/df_k known for each feature f_k, the sum S of all g_k f_k has dS/df_k = g_k, so a
    backward pass through S reaches the parameters as one through L would.
    """
    total = torch.zeros((), dtype=torch.float32)
    for name, feature in features.items():
        if feature.requires_grad:  # also at gradient 0: every parameter takes part in the pass, as engines expect
            given = gradients.get(name)
            part = 0 * feature.sum() if given is None else (feature * given).sum()
            total = total.to(part) + part
    return total
