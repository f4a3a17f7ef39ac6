"""Distillation: the contrastive loss plus what a frozen teacher adds, each part with its own weight.

Source: feature matching and logit distillation as in CLIP-KD (arXiv 2307.12732) and open_clip `DistillClipLoss`
(peers.md A5), with weights, the teacher's own picture size and context, and over all ranks.
"""

# B this rank's batch, G global batch, L text tokens, E student's and T teacher's embedding

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evatool.distributed.collectives import all_gather_with_grad
from evatool.objective.cached import FeatureObjective, Features
from evatool.objective.contrastive import PARAMETER_BOUNDS, encode_pair, logit_scale, positive_ids, unit
from evatool.objective.infonce import infonce_loss
from evatool.objective.text import encode_text, fit_tokens
from evatool.objective.tiles import exact
from evatool.recipe import schema
from evatool.types import Batch, LossDict


class ClipTeacher(Protocol):
    """A frozen CLIP model in eval mode, on the device of the batch, that keeps its own pixel statistics."""

    @property
    def model(self) -> nn.Module:
        """The towers, for the text side."""
        ...

    @property
    def context_length(self) -> int:
        """Text tokens of a caption."""
        ...

    @property
    def logit_scale(self) -> float:
        """The temperature, exponentiated."""
        ...

    def encode_image(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, T)."""
        ...


class DistillObjective(FeatureObjective):
    """A student CLIP that learns from pairs and from a teacher.

    Args:
        student: as in `ClipObjective`.
        teacher: frozen; kept out of this module's parameters and state.
        section: the recipe's `[objective]`.
        context_length: text tokens of the student; batches may hold more, cut to it for the student.
        student_width, teacher_width: E and T. Where they differ and features are matched, one learned projection per
            tower carries the student's features to the teacher's width; the projections are no part of the student.
    """

    parameter_bounds = PARAMETER_BOUNDS

    def __init__(
        self,
        student: nn.Module,
        teacher: ClipTeacher,
        section: schema.DistillObjective,
        *,
        context_length: int,
        student_width: int,
        teacher_width: int,
    ) -> None:
        super().__init__()
        self.model = student
        self.section = section
        self.context_length = context_length
        self._teacher = (teacher,)  # in a tuple, so that torch does not register a module
        if section.feature_weight > 0 and student_width != teacher_width:
            self.image_projection: nn.Module = nn.Linear(student_width, teacher_width, bias=False)
            self.text_projection: nn.Module = nn.Linear(student_width, teacher_width, bias=False)
        else:
            self.image_projection = self.text_projection = nn.Identity()

    @property
    def teacher(self) -> ClipTeacher:
        """The frozen teacher."""
        return self._teacher[0]

    def encode(self, batch: Batch) -> Features:
        image, text = encode_pair(self.model, self.student_view(batch))
        features = {"image": image, "text": text, "scale": logit_scale(self.model)}
        if self.section.feature_weight > 0:
            features["projected_image"], features["projected_text"] = self.project(image, text)
        return features

    def targets(self, batch: Batch) -> Features:
        image, text = teacher_features(self.teacher, batch)
        return {"teacher_image": image, "teacher_text": text}

    def losses(self, features: Features, batch: Batch) -> LossDict:
        """Losses of this rank's samples against the global batch; all ranks must call it together.

        Returns: `loss` (the weighted sum, with gradient); unweighted, for the log: `contrastive_loss`, `feature_loss`
            and `logit_loss` (those whose weight is not 0), `i2t_top1`, `t2i_top1`, `logit_scale` (exponentiated).
        """
        section, scale = self.section, features["scale"]
        student = features["image"], features["text"]
        teacher = features["teacher_image"], features["teacher_text"]
        # Also at weight 0: every parameter then takes part in each step, which the multi-rank engines ask for.
        contrastive_loss, accuracies = infonce_loss(*student, scale, positive_ids(batch, section.positives))
        parts = {"contrastive_loss": contrastive_loss}
        if section.feature_weight > 0:
            projected = features["projected_image"], features["projected_text"]
            parts["feature_loss"] = feature_loss(projected, teacher)
        if section.logit_weight > 0:
            parts["logit_loss"] = logit_loss(pair_logits(*student, scale), teacher_logits(self.teacher, teacher))
        weights = {
            "contrastive_loss": section.contrastive_weight,
            "feature_loss": section.feature_weight,
            "logit_loss": section.logit_weight,
        }
        loss = sum((weights[name] * part for name, part in parts.items()), torch.zeros((), device=scale.device))
        logs = {name: part.detach() for name, part in parts.items()}
        return {"loss": loss, **logs, **accuracies, "logit_scale": scale.detach()}

    def student_view(self, batch: Batch) -> Batch:
        """The batch at the student's context length: captions are tokenized once, for the longer of both contexts."""
        assert batch.tokens is not None, "distillation needs tokens in its batches"
        assert batch.text_lengths is not None
        lengths = batch.text_lengths.clamp(max=self.context_length)
        return replace(batch, tokens=fit_tokens(batch.tokens, self.context_length), text_lengths=lengths)

    def project(self, image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
        """The student's features at the teacher's width, unit length."""
        return unit(self.image_projection(image_features)), unit(self.text_projection(text_features))


# -------------------------------------------------------------------------------------------------------- teacher


@torch.no_grad()
def teacher_features(teacher: ClipTeacher, batch: Batch) -> tuple[Tensor, Tensor]:
    """The teacher's unit-length image and text features (B, T) of the same samples, without gradient."""
    assert batch.tokens is not None, "distillation needs tokens in its batches"
    assert batch.text_lengths is not None
    image = batch.image if batch.teacher_image is None else batch.teacher_image
    tokens = fit_tokens(batch.tokens, teacher.context_length)
    lengths = batch.text_lengths.clamp(max=teacher.context_length)
    return unit(teacher.encode_image(image)), unit(encode_text(teacher.model, tokens, lengths))


@torch.no_grad()
def teacher_logits(teacher: ClipTeacher, features: tuple[Tensor, Tensor]) -> Logits:
    """The teacher's similarities of this rank's samples against the global batch, at the teacher's own temperature."""
    return pair_logits(*features, teacher.logit_scale)


# --------------------------------------------------------------------------------------------------------- losses


Logits = tuple[Tensor, Tensor]
"""This rank's rows, image against all texts and text against all images, each (B, G) float32 or wider."""


def pair_logits(image_features: Tensor, text_features: Tensor, scale: Tensor | float) -> Logits:
    """Scaled similarities of this rank's samples against the global batch; gradients reach every rank's features.

    Args:
        image_features, text_features: (B, E) unit length; the same B on every rank. All ranks must call this.
        scale: exponentiated temperature.
    """
    with exact(image_features.device):
        per_image = scale * image_features @ all_gather_with_grad(text_features).T
        per_text = scale * text_features @ all_gather_with_grad(image_features).T
    return per_image, per_text


def feature_loss(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """1 - cosine between student and teacher, averaged over this rank's samples and both towers; in [0, 2].

    Args:
        student, teacher: (image, text) features (B, T) of unit length.
    """
    dtype = student[0].dtype
    cosines = [(s * t.to(dtype)).sum(dim=-1).mean() for s, t in zip(student, teacher, strict=True)]
    return 1 - (cosines[0] + cosines[1]) / 2


def logit_loss(student: Logits, teacher: Logits) -> Tensor:
    """KL divergence from the teacher's to the student's softmax over the global batch, both directions averaged.

    Its gradient is open_clip `DistillClipLoss`'s, which reports the cross-entropy (KL plus the teacher's entropy).
    """
    parts = [
        F.kl_div(s.log_softmax(dim=1), t.to(s.dtype).log_softmax(dim=1), reduction="batchmean", log_target=True)
        for s, t in zip(student, teacher, strict=True)
    ]
    return (parts[0] + parts[1]) / 2
