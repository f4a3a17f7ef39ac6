"""One stage instead of two: the contrastive loss, and a teacher's patch features at masked places of the same pictures.

EVA trains the image tower by masked image modelling first and contrastively after it. Here both losses teach it at
once: a whole picture goes through the tower for the contrastive loss, the same picture with mask tokens for the other.
Source: the objectives of EVA (arXiv 2211.07636) and CLIP or SigLIP; joint with a contrastive loss in MaskCLIP (arXiv
2208.12262), TIPS (arXiv 2410.16512) and SigLIP 2 (arXiv 2502.14786), whose teacher is a moving average of the student.
A frozen teacher in its place is our choice.
"""

# B this rank's batch, S input side in pixels, N patches, M most masked patches of a picture, D width of the tower,
# T width of the teacher's features

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from evatool.core.batch import Batch, LossDict
from evatool.core.image_norm import normalize_images
from evatool.core.step import StepContext
from evatool.distributed.collectives import all_reduce_mean
from evatool.objective.base import START, Features
from evatool.objective.clip import ClipObjective
from evatool.objective.mim import PatchStore, PatchTeacher, masked_targets, patch_cosine
from evatool.recipe.schema import InfoNceObjective, SigmoidObjective


class MaskedTower(Protocol):
    """The image tower of the model that learns, called so that mask tokens stand at hidden places."""

    def __call__(self, image: Tensor, mask: Tensor, mask_token: Tensor) -> Tensor:
        """(B, 3, S, S) normalised, (B, N) bool, (1, 1, D) -> (B, 1 + N, D) after the final norm."""
        ...


class JointObjective(ClipObjective):
    """The contrastive objective, and beside it masked image modelling with its own weight.

    Mask token and prediction head are parameters of this objective and not of the model, which stays an ordinary CLIP.
    Predictions and targets are features like the others, so a batch divided into small ones has exactly the loss and
    gradient of the whole, and the teacher runs once a picture. That keeps 2 x M x T numbers a sample.

    Args:
        model, section: as in `ClipObjective`; the section has its `mim`.
        tower: `model`'s.
        width: D.
        predict_dim: T.
        num_masked: M; masks may have fewer.
        teacher: frozen; kept out of this module's parameters and state.
        store: what the teacher has said before.
    """

    def __init__(
        self,
        model: nn.Module,
        section: InfoNceObjective | SigmoidObjective,
        *,
        tower: MaskedTower,
        width: int,
        predict_dim: int,
        num_masked: int,
        teacher: PatchTeacher,
        store: PatchStore | None = None,
    ) -> None:
        super().__init__(model, section)
        assert section.mim is not None, "the joint objective needs its section"
        self.weight = section.mim.weight
        self.chance_loss = "contrastive_loss" if isinstance(section, InfoNceObjective) else None
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.mim_head = nn.Linear(width, predict_dim)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.mim_head.weight, std=0.02)
        nn.init.zeros_(self.mim_head.bias)
        self._num_masked = num_masked
        self._others = (tower, teacher, store)  # in a tuple, so that torch does not register a module

    def encode(self, batch: Batch) -> Features:
        tower, mask = self._others[0], _mask_of(batch)
        features = super().encode(batch)
        dtype = self.mim_head.weight.dtype
        tokens = tower(normalize_images(batch.image, dtype=dtype), mask, self.mask_token)[:, 1:]
        places, _ = masked_positions(mask, self._num_masked)
        at_places = tokens.gather(1, places.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        return features | {"mim": self.mim_head(at_places)}

    def targets(self, batch: Batch) -> Features:
        """The teacher's features at the masked places, and which places are (a mask may have fewer than M)."""
        _, teacher, store = self._others
        _, is_place = masked_positions(_mask_of(batch), self._num_masked)
        rows = masked_targets(teacher, store, batch)
        target = rows.new_zeros(*is_place.shape, rows.shape[-1])
        target[is_place] = rows
        return {"mim_target": target, "mim_is_place": is_place}

    def losses(self, features: Features, batch: Batch, step: StepContext = START) -> LossDict:
        """As `ClipObjective.losses`, with `contrastive_loss` and `mim_loss` beside their weighted sum.

        The mean of `mim_loss` over ranks is the negative cosine averaged over all masked patches of the global batch.
        """
        losses = super().losses(features, batch, step)
        is_place = features["mim_is_place"]
        cosine = patch_cosine(features["mim"], features["mim_target"]).masked_fill(~is_place, 0.0)
        # Ranks mask different numbers of patches; each patch of the global batch weighs the same.
        mim_loss = -cosine.sum() / all_reduce_mean(is_place.sum().to(cosine.dtype))
        contrastive = losses.pop("loss")
        logs = {"contrastive_loss": contrastive.detach(), "mim_loss": mim_loss.detach()}
        return {"loss": contrastive + self.weight * mim_loss, **logs, **losses}


def masked_positions(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(B, count) patch numbers, the masked ones first in rising order; and bool (B, count), True where masked."""
    places = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
    return places, mask.gather(1, places)


def _mask_of(batch: Batch) -> Tensor:
    assert batch.mask is not None, "masked image modelling needs masks in its batches"
    return batch.mask
