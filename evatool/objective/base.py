"""Objectives whose loss compares the samples of a batch: features first, then a loss between them.

Divided like this, the loss of a large batch can be had from small ones (GradCache, arXiv 2101.06983): features without
graph, the loss and its gradient with respect to them once, then each small batch again with that gradient.
"""

# B samples of a batch

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from evatool.core.batch import Batch, LossDict

Features = dict[str, Tensor]
"""By name: (B, ...) tensors with one row a sample, and scalars such as the temperature that all samples share."""


class FeatureObjective(nn.Module, ABC):
    """An objective in three parts, of which only `encode` uses parameters."""

    @abstractmethod
    def encode(self, batch: Batch) -> Features:
        """What the model makes of each sample, and its learned scalars, with gradient; no collective is called."""

    def targets(self, batch: Batch) -> Features:
        """What the features are compared with besides each other, without gradient; nothing unless a subclass says."""
        return {}

    @abstractmethod
    def losses(self, features: Features, batch: Batch) -> LossDict:
        """Losses of this rank's samples against the global batch; all ranks must call it together.

        Args:
            features: of `encode` and `targets` together.
            batch: the same samples; only what is not a picture or text is looked at.
        """

    def forward(
        self,
        batch: Batch,
        part: Literal["loss", "features", "encoding"] = "loss",
        gradients: Mapping[str, Tensor] | None = None,
    ) -> LossDict:
        """The whole of it, or one part; through one method, since engines watch a module's `forward`.

        Args:
            part: "loss" for the losses of the batch, "features" for `encode` and `targets`, "encoding" for `encode`.
            gradients: with "encoding", of the loss with respect to each feature: what comes back is `{"loss"}`, whose
                gradient is the loss's own by way of these samples. Scalars that are left out get no gradient.
        """
        if part == "loss":
            return self.losses(self.encode(batch) | self.targets(batch), batch)
        encoded = self.encode(batch)
        if part == "features":
            return encoded | self.targets(batch)
        return encoded if gradients is None else {"loss": surrogate_loss(encoded, gradients)}


def surrogate_loss(features: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Tensor:
    """A scalar whose gradient with respect to the features is `gradients`, and 0 for those without one."""
    total = torch.zeros((), dtype=torch.float32)
    for name, feature in features.items():
        if feature.requires_grad:  # also at gradient 0: every parameter takes part in the pass, as engines expect
            given = gradients.get(name)
            part = 0 * feature.sum() if given is None else (feature * given).sum()
            total = total.to(part) + part
    return total
