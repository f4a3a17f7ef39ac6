"""Masked image modelling beside a contrastive loss: a teacher's patch features at hidden places of the same images.

EVA trains the image tower by masked image modelling first and contrastively after it. Here both losses teach it at
once: a whole image goes through the tower for the contrastive loss, the same image with mask tokens for this one.
Source: the objectives of EVA (arXiv 2211.07636) and CLIP or SigLIP; joint with a contrastive loss in MaskCLIP (arXiv
2208.12262), TIPS (arXiv 2410.16512) and SigLIP 2 (arXiv 2502.14786), whose teacher is a moving average of the student.
A frozen teacher in its place is our choice.
"""

# B this rank's samples, N patches, M most masked patches of an image, D width of the tower, T width of the teacher's
# features

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from evatool.core.batch import Batch
from evatool.core.image_norm import normalize_for
from evatool.distributed.collectives import all_reduce_mean
from evatool.distributed.engines.random_fill import trunc_normal_
from evatool.model.mim import masked_tokens
from evatool.objective.base import Features
from evatool.objective.mim import masked_targets, patch_cosine
from evatool.objective.terms.base import LossTerm, TermLoss
from evatool.recipe.schema.distill import Weight
from evatool.teachers.base import PatchStore, PatchTeacher


class MimTerm(LossTerm):
    """Negative cosine between predicted and teacher features, averaged over the masked patches of the global batch.

    Mask token and prediction head are this term's and not the model's, which stays an ordinary CLIP; its image tower
    must be one of EVA's. Predictions and targets are features like others, which keeps 2 x M x T numbers a sample, and
    the teacher runs once an image.

    Args:
        width: D.
        predict_dim: T.
        num_masked: M; masks may have fewer.
        teacher: frozen; not part of the objective's parameters and state.
        store: the teacher's features of images that it has met before.
        weight: as in `LossTerm`.
    """

    batch_fields = ("mask",)

    def __init__(
        self,
        *,
        width: int,
        predict_dim: int,
        num_masked: int,
        teacher: PatchTeacher,
        store: PatchStore | None = None,
        weight: Weight = 1.0,
    ) -> None:
        super().__init__("mim_loss", weight)
        mask_token, head = nn.Parameter(torch.empty(1, 1, width)), nn.Linear(width, predict_dim)
        trunc_normal_(mask_token, std=0.02)
        trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        self.add_part("mask_token", mask_token, tower="visual")  # an input of the image tower
        self.add_part("mim_head", head)
        self._num_masked, self._teacher, self._store = num_masked, teacher, store

    def encode(self, model: nn.Module, batch: Batch, features: Features) -> Features:
        visual: Any = model.visual
        mask, head = mask_of(batch), self.part("mim_head")
        pixels = normalize_for(model, batch.image, head.weight.dtype)
        tokens = masked_tokens(visual.trunk, pixels, mask, self.part("mask_token"))[:, 1:]
        positions, _ = masked_positions(mask, self._num_masked)
        at_positions = tokens.gather(1, positions.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        return {"mim": head(at_positions)}

    def targets(self, batch: Batch, found: Features) -> Features:
        """The teacher's features at the masked positions, and which are real ones (a mask may have fewer than M)."""
        _, is_masked = masked_positions(mask_of(batch), self._num_masked)
        rows = masked_targets(self._teacher, self._store, batch)
        target = rows.new_zeros(*is_masked.shape, rows.shape[-1])
        target[is_masked] = rows
        return {"mim_target": target, "mim_is_masked": is_masked}

    def loss(self, features: Features, batch: Batch) -> TermLoss:
        """The loss; its mean over ranks is the negative cosine over all masked patches of the global batch."""
        is_masked = features["mim_is_masked"]
        cosine = patch_cosine(features["mim"], features["mim_target"]).masked_fill(~is_masked, 0.0)
        # Ranks mask different numbers of patches; each patch of the global batch weighs the same.
        return -cosine.sum() / all_reduce_mean(is_masked.sum().to(cosine.dtype)), {}


def masked_positions(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Positions of the masked patches of each image, padded to `count` with others.

    A stable sort of 0 (masked) before 1 keeps the patches' order within both:

        mask       0 1 0 1 1    ->  sort keys 1 0 1 0 0  ->  positions 1 3 4 | 0 2  ->  the first `count` of them

    Args:
        mask: (B, N) bool, True where the patch is hidden.
    Returns: (B, count) int64 patch numbers, the masked ones first in rising order; (B, count) bool, True where masked.
    """
    positions = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
    return positions, mask.gather(1, positions)


def mask_of(batch: Batch) -> Tensor:
    """The batch's masks (B, N)."""
    assert batch.mask is not None, "masked image modelling needs masks in its batches"
    return batch.mask
