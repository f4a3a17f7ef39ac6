"""Masked image modelling: predict a CLIP teacher's patch features at patches that the student does not see.

Source: EVA (arXiv 2211.07636), EVA-02 (arXiv 2303.11331); EVA-02/asuka/engine_for_pretraining.py
(docs/reference/eva.md#mim-student, #mim-targets and #mim-loss).
"""

# B this rank's batch, N patches, M masked patches of the batch, T width of the teacher's features

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evatool.core.batch import Batch, LossDict
from evatool.core.image_norm import normalize_for
from evatool.core.step import StepContext
from evatool.objective.base import START, SumObjective
from evatool.teachers.base import PatchStore, PatchTeacher


class MimObjective(SumObjective):
    """A student that sees masked pictures, a teacher that sees whole ones, and the loss between their patch features.

    Args:
        student: called as `student(image, mask)`, returns predictions (M, T) at the masked patches, row-major.
        teacher: frozen; kept out of this module's parameters and state.
        store: what the teacher has said before; it then runs only where a batch has pictures that are not in there.
    """

    def __init__(self, student: nn.Module, teacher: PatchTeacher, store: PatchStore | None = None) -> None:
        super().__init__()
        self.model = student
        self.store = store
        self._teacher = (teacher,)  # in a tuple, so that torch does not register a module

    @property
    def teacher(self) -> PatchTeacher:
        """The frozen teacher."""
        return self._teacher[0]

    def forward(self, batch: Batch, step: StepContext = START) -> LossDict:
        """Loss of this rank's masked patches; no collective is called.

        Returns: `loss` with gradient, in [-1, 1]; `mask_ratio`, the share of patches that was masked.
        """
        prediction, target = self.predict(batch)
        assert batch.mask is not None
        return {"loss": masked_feature_loss(prediction, target), "mask_ratio": batch.mask.float().mean()}

    def shares(self, batches: Sequence[Batch]) -> list[float]:
        """The weight of each part of a batch in its loss: its share of the masked patches."""
        counts = [int(batch.mask.sum()) for batch in batches if batch.mask is not None]
        return [count / sum(counts) for count in counts]

    def predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The student's predictions and the teacher's features (without gradient) at masked patches; both (M, T)."""
        assert batch.mask is not None, "masked image modelling needs masks in its batches"
        target = self.targets(batch)
        return self.predict_masked(batch), target

    def predict_masked(self, batch: Batch) -> Tensor:
        """The student's predictions (M, T) at masked patches."""
        prediction: Tensor = self.model(normalize_for(self.model, batch.image, self._dtype), batch.mask)
        return prediction

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def predict_all(self, batch: Batch) -> Tensor:
        """The student's predictions (B, N, T) at all patches."""
        student: Any = self.model
        predictions: Tensor = student.predict_all(normalize_for(student, batch.image, self._dtype), batch.mask)
        return predictions

    def known_features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The teacher's features (B, N, T) float32, and where they are known (B, N): everywhere, or only at masked
        patches where the store keeps no others."""
        mask = batch.mask
        assert mask is not None, "masked image modelling needs masks in its batches"
        rows = None if self.store is None else self.store.rows(batch)
        if self.store is None or rows is None:
            return teacher_tokens(self.teacher, batch).float(), torch.ones_like(mask)
        if rows.shape[1] == mask.shape[1]:
            return rows.float(), torch.ones_like(mask)
        features = torch.zeros(*mask.shape, rows.shape[2], device=rows.device)
        features[mask] = self.store.at_masked(rows, mask).float()
        return features, mask

    def targets(self, batch: Batch) -> Tensor:
        """`masked_targets` of this objective's teacher and store."""
        return masked_targets(self.teacher, self.store, batch)


def masked_targets(teacher: PatchTeacher, store: PatchStore | None, batch: Batch) -> Tensor:
    """The teacher's features (M, T) at the masked patches, from the store where it has all of the batch's."""
    assert batch.mask is not None, "masked image modelling needs masks in its batches"
    if store is None:
        return teacher_tokens(teacher, batch)[batch.mask]
    rows = store.rows(batch)
    if rows is None:
        rows = store.keep(batch, teacher_tokens(teacher, batch))
    return store.at_masked(rows, batch.mask)


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
