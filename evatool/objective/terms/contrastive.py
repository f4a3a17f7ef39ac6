"""The contrastive losses between the features of both towers: softmax (CLIP) or sigmoid (SigLIP).

Source: CLIP (arXiv 2103.00020), EVA-CLIP (arXiv 2303.15389), SigLIP (arXiv 2303.15343).
"""

# B this rank's samples, E embedding

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from evatool.core.batch import Batch
from evatool.model.features import set_logit_scale
from evatool.objective.base import Features
from evatool.objective.terms.base import LossTerm, TermLoss
from evatool.objective.tiled.infonce import infonce_loss
from evatool.objective.tiled.sigmoid import sigmoid_loss
from evatool.recipe.schema.distill import Weight

Positives = Literal["pair", "equal-captions"]
"""The captions that are right for an image: its own alone, or every one that is equal to its own."""

LEARNED_SCALE_BOUNDS = {"model.logit_scale": (0.0, math.log(100))}
"""The logarithm of the scale after every optimiser step (docs/reference/eva.md#contrastive-loss)."""


class InfoNceTerm(LossTerm):
    """CLIP's softmax over the global batch, in both directions.

    Args:
        positives: which captions are right.
        temperature: what similarities are divided by, from the first step to the last; learned from the model's own
            value on when None.
        weight: as in `LossTerm`.
    """

    starts_at_ln_batch = True

    def __init__(
        self, positives: Positives = "pair", *, temperature: float | None = None, weight: Weight = 1.0
    ) -> None:
        super().__init__("contrastive_loss", weight)
        self.positives, self.temperature = positives, temperature
        if temperature is None:
            self.parameter_bounds = LEARNED_SCALE_BOUNDS

    def prepare(self, model: nn.Module) -> None:
        if self.temperature is not None:
            set_logit_scale(model, 1 / self.temperature).requires_grad_(False)

    def loss(self, features: Features, batch: Batch) -> TermLoss:
        """The loss, and `i2t_top1` and `t2i_top1`, the accuracy within the global batch."""
        caption_id = positive_ids(batch, self.positives)
        return infonce_loss(features["image"], features["text"], features["scale"], caption_id)


class SigmoidTerm(LossTerm):
    """SigLIP's yes-or-no question for every pair of the global batch. It owns `logit_bias`, added to similarities.

    Ranking captions needs no bias, so it is no part of the model, which stays what it is.

    Args:
        initial_scale: factor on the cosines at the start.
        initial_bias: added to all similarities at the start; learned.
        positives: which captions are right.
        weight: as in `LossTerm`.
    """

    parameter_bounds = LEARNED_SCALE_BOUNDS

    def __init__(
        self,
        initial_scale: float = 10.0,
        initial_bias: float = -10.0,
        positives: Positives = "pair",
        *,
        weight: Weight = 1.0,
    ) -> None:
        super().__init__("contrastive_loss", weight)
        self.initial_scale, self.positives = initial_scale, positives
        self.add_part("logit_bias", nn.Parameter(torch.full((1,), initial_bias)))

    def prepare(self, model: nn.Module) -> None:
        set_logit_scale(model, self.initial_scale)

    def encode(self, model: nn.Module, batch: Batch, features: Features) -> Features:
        return {"bias": self.part("logit_bias").squeeze()}

    def loss(self, features: Features, batch: Batch) -> TermLoss:
        """The loss; `i2t_top1` and `t2i_top1`, the accuracy within the global batch; and `logit_bias`."""
        scale, bias = features["scale"], features["bias"]
        caption_id = positive_ids(batch, self.positives)
        loss, logs = sigmoid_loss(features["image"], features["text"], scale, bias, caption_id)
        # A copy: it is read after the step, which changes the parameter in place.
        return loss, logs | {"logit_bias": bias.detach().clone()}


def positive_ids(batch: Batch, positives: Positives) -> Tensor | None:
    """The ids that tell equal captions apart, or None where only the own caption is right."""
    if positives == "pair":
        return None
    assert batch.caption_id is not None, "positives = 'equal-captions' needs caption ids in its batches"
    return batch.caption_id
