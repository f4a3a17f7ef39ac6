"""Masked image modelling: predict a CLIP teacher's patch features at the places the student does not see.

Source: EVA (arXiv 2211.07636), EVA-02 (arXiv 2303.11331); EVA-02/asuka/engine_for_pretraining.py (eva.md 2.3-2.5).
"""

# B this rank's batch, N patches, M masked patches of the batch, T width of the teacher's features

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evatool.pixels import normalize_images
from evatool.recipe import schema
from evatool.types import Batch, LossDict


class PatchTeacher(Protocol):
    """A frozen model in eval mode, on the device of the batch, that keeps its own pixel statistics."""

    def visual_tokens(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, N, T): patch tokens after final norm and projection, without the class token."""
        ...


class MimObjective(nn.Module):
    """A student that sees masked pictures, a teacher that sees whole ones, and the loss between their patch features.

    Args:
        student: called as `student(image, mask)`, returns predictions (M, T) at the masked patches, row-major.
        teacher: frozen; kept out of this module's parameters and state.
        section: the recipe's `[objective]`; the masks themselves come with the batches.
    """

    def __init__(self, student: nn.Module, teacher: PatchTeacher, section: schema.MimObjective) -> None:
        super().__init__()
        self.model = student
        self.section = section
        self._teacher = (teacher,)  # in a tuple, so that torch does not register a module

    @property
    def teacher(self) -> PatchTeacher:
        """The frozen teacher."""
        return self._teacher[0]

    def forward(self, batch: Batch) -> LossDict:
        """Loss of this rank's masked patches; no collective is called.

        Returns: `loss` with gradient, in [-1, 1]; `mask_ratio`, the share of patches that was masked.
        """
        prediction, target, mask = self.predict(batch)
        return {"loss": masked_feature_loss(prediction, target[mask]), "mask_ratio": mask.float().mean()}

    def shares(self, batches: Sequence[Batch]) -> list[float]:
        """What each part of a batch counts in its loss: its share of the masked patches."""
        counts = [int(batch.mask.sum()) for batch in batches if batch.mask is not None]
        return [count / sum(counts) for count in counts]

    def predict(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The student's predictions (M, T), the teacher's features (B, N, T) without gradient, and the mask (B, N)."""
        assert batch.mask is not None, "masked image modelling needs masks in its batches"
        target = teacher_tokens(self.teacher, batch)
        dtype = next(self.model.parameters()).dtype
        return self.model(normalize_images(batch.image, dtype=dtype), batch.mask), target, batch.mask


@torch.no_grad()
def teacher_tokens(teacher: PatchTeacher, batch: Batch) -> Tensor:
    """The target of each patch (B, N, T), from the teacher's own view of the pictures where the batch has one."""
    return teacher.visual_tokens(batch.image if batch.teacher_image is None else batch.teacher_image)


def masked_feature_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Negative cosine similarity of predicted and teacher features, averaged over masked patches.

    Args:
        prediction, target: (M, T) float, need not be normalised; no gradient to the target.
    Returns: scalar, float32 or wider, in [-1, 1]; every masked patch weighs the same. This rank's mean only, as in the
        release: where ranks mask different numbers of patches, their means still weigh the same.
    Raises: ValueError if no patch is masked or the shapes differ.
    Source: EVA-02/asuka/engine_for_pretraining.py. Parity: tests/objective/test_mim.py.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"predictions {tuple(prediction.shape)} and targets {tuple(target.shape)} differ in shape")
    if not len(prediction):
        raise ValueError("no patch of this batch is masked: there is nothing to predict")
    return -patch_cosine(prediction, target).mean()


def patch_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Cosine similarity along the last axis in float32 or wider, also under autocast; no gradient to the target."""
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return F.cosine_similarity(prediction.to(dtype), target.detach().to(dtype), dim=-1)
