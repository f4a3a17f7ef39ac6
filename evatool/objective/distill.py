"""Distillation: the contrastive loss plus what frozen teachers add, each part with its own weight.

Source: feature matching, logit distillation and interactive contrastive learning as in CLIP-KD (arXiv 2307.12732);
logit distillation as in open_clip `DistillClipLoss` too
(docs/reference/open-clip-and-clip-benchmark.md#distillation-in-open_clip). With weights over the run, several teachers,
each with its own picture size and context, and over all ranks.
"""

# B this rank's batch, L text tokens, E student's and T teacher's embedding

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evatool.core.batch import Batch, LossDict
from evatool.core.step import StepContext
from evatool.model.features import FeaturePair, l2_normalize
from evatool.model.text import fit_tokens
from evatool.objective.base import START, FeatureObjective, Features
from evatool.objective.clip import (
    PARAMETER_BOUNDS,
    encode_pair,
    logit_scale,
    positive_ids,
    set_logit_scale,
)
from evatool.objective.tiled.divergence import sigmoid_divergence, softmax_divergence
from evatool.objective.tiled.infonce import infonce_loss
from evatool.objective.tiled.relation import interactive_loss, relation_loss
from evatool.objective.tiled.sigmoid import sigmoid_loss
from evatool.recipe import schema
from evatool.recipe.schema.distill import is_used, weight_at
from evatool.teachers.base import Teacher

INITIAL_SCALE, INITIAL_BIAS = 10.0, -10.0
"""Of a sigmoid loss, as train-clip's."""


class DistillObjective(FeatureObjective):
    """A student CLIP that learns from pairs and from teachers.

    Args:
        student: as in `ClipObjective`.
        teachers: frozen; kept out of this module's parameters and state.
        section: the recipe's `[objective]`.
        context_length: text tokens of the student; batches may hold more, cut to it for the student.
        student_width: E. Where it is not a teacher's, and features are matched with it or contrasted, one learned
            projection per tower carries the student's features to the teacher's width; they are no part of the student.
    Attributes:
        weights: of each loss now; `set_samples_seen` moves them on.
    """

    parameter_bounds = PARAMETER_BOUNDS

    def __init__(
        self,
        student: nn.Module,
        teachers: Sequence[Teacher],
        section: schema.DistillObjective,
        *,
        context_length: int,
        student_width: int,
    ) -> None:
        super().__init__()
        self.model = student
        self.section = section
        self.context_length = context_length
        self.teachers = tuple(teachers)
        self._used = {name for name, weight in section.weights.items() if is_used(weight)}
        self._needs_width = not self._used.isdisjoint({"feature_loss", "interactive_loss"})
        for teacher in self.teachers:
            if self._needs_width and teacher.width != student_width:
                for tower in ("image", "text"):
                    layer = nn.Linear(student_width, teacher.width, bias=False)
                    self.add_module(_projection_name(tower, teacher), layer)
        if section.loss == "sigmoid":
            set_logit_scale(student, section.initial_scale or INITIAL_SCALE)
            bias = INITIAL_BIAS if section.initial_bias is None else section.initial_bias
            self.logit_bias = nn.Parameter(torch.full((1,), bias))
        self.weights: dict[str, float] = {}
        self.chance_loss = "contrastive_loss" if section.loss == "infonce" else None
        self.set_samples_seen(0)

    def set_samples_seen(self, samples_seen: int) -> None:
        """The losses' weights from here on are those after so many samples of the run."""
        self.weights = {name: weight_at(weight, samples_seen) for name, weight in self.section.weights.items()}

    def encode(self, batch: Batch) -> Features:
        image, text = encode_pair(self.model, self.student_view(batch))
        features = {"image": image, "text": text, "scale": logit_scale(self.model)}
        if self.section.loss == "sigmoid":
            features["bias"] = self.logit_bias.squeeze()
        for teacher in self.teachers:
            for tower in ("image", "text"):
                layer = getattr(self, _projection_name(tower, teacher), None)
                if layer is not None:
                    features[teacher.key(f"projected_{tower}")] = l2_normalize(layer(features[tower]))
        return features

    def targets(self, batch: Batch) -> Features:
        found: Features = {}
        for teacher in self.teachers:
            image, text = teacher.features(batch)
            found |= {teacher.key("teacher_image"): image, teacher.key("teacher_text"): text}
        return found

    def losses(self, features: Features, batch: Batch, step: StepContext = START) -> LossDict:
        """Losses of this rank's samples against the global batch; all ranks must call it together.

        Returns: `loss` (the weighted sum, with gradient); unweighted, for the log: `contrastive_loss`, and of those
            that have weight at any time of the run `feature_loss`, `logit_loss`, `relation_loss` and
            `interactive_loss` (`.../NAME` of each of several teachers); `i2t_top1`, `t2i_top1`, `logit_scale`
            (exponentiated) and, of a sigmoid loss, `logit_bias`.
        """
        scale, bias = features["scale"], features.get("bias")
        student = features["image"], features["text"]
        caption_id = positive_ids(batch, self.section.positives)
        # Also at weight 0: every parameter then takes part in each step, which the multi-rank engines ask for.
        if bias is None:
            contrastive_loss, logs = infonce_loss(*student, scale, caption_id)
        else:
            contrastive_loss, logs = sigmoid_loss(*student, scale, bias, caption_id)
            # A copy: it is read after the step, which changes the parameter in place.
            logs["logit_bias"] = bias.detach().clone()
        loss = self.weights["contrastive_loss"] * contrastive_loss
        parts = {"contrastive_loss": contrastive_loss.detach()}
        for teacher in self.teachers:
            for name, part in self._taught(teacher, features, caption_id).items():
                loss = loss + teacher.weight * self.weights[name] * part
                parts[teacher.key(name)] = part.detach()
        return {"loss": loss, **parts, **logs, "logit_scale": scale.detach()}

    def _taught(self, teacher: Teacher, features: Features, caption_id: Tensor | None) -> dict[str, Tensor]:
        """What one teacher adds, unweighted."""
        scale, bias, section = features["scale"], features.get("bias"), self.section
        student = features["image"], features["text"]
        image, text = (features[teacher.key(f"teacher_{tower}")].to(student[0].dtype) for tower in ("image", "text"))
        fitted = (
            features.get(teacher.key("projected_image"), features["image"]),
            features.get(teacher.key("projected_text"), features["text"]),
        )
        parts: dict[str, Tensor] = {}
        if "feature_loss" in self._used:
            parts["feature_loss"] = feature_loss(fitted, (image, text), section.feature_loss)
        if "logit_loss" in self._used:
            known = (image, text), teacher.logit_scale
            if bias is None:
                parts["logit_loss"] = softmax_divergence(student, scale, *known, section.logit_temperature)
            else:
                assert teacher.bias is not None, "a sigmoid loss's teacher needs a bias"
                parts["logit_loss"] = sigmoid_divergence(
                    student, scale, bias, *known, teacher.bias, section.logit_temperature
                )
        if "relation_loss" in self._used:
            parts["relation_loss"] = relation_loss(student, (image, text))
        if "interactive_loss" in self._used:
            parts["interactive_loss"] = interactive_loss(fitted, (image, text), scale, caption_id, bias)
        return parts

    def student_view(self, batch: Batch) -> Batch:
        """The batch at the student's context length: captions are tokenized once, for the longest of all contexts."""
        assert batch.tokens is not None, "distillation needs tokens in its batches"
        assert batch.text_lengths is not None
        lengths = batch.text_lengths.clamp(max=self.context_length)
        return replace(batch, tokens=fit_tokens(batch.tokens, self.context_length), text_lengths=lengths)


def _projection_name(tower: str, teacher: Teacher) -> str:
    return (f"{teacher.name}_" if teacher.name else "") + f"{tower}_projection"


def feature_loss(student: FeaturePair, teacher: FeaturePair, kind: str = "cosine") -> Tensor:
    """How far the student's features are from the teacher's, averaged over this rank's samples; no collective.

    Args:
        student, teacher: (image, text) features (B, T) of unit length.
        kind: "cosine" for 1 - cosine averaged over both towers, in [0, 2]; "mse" for the mean squared difference of
            elements, both towers added, as CLIP-KD's FD.
    """
    if kind == "mse":
        return F.mse_loss(student[0], teacher[0]) + F.mse_loss(student[1], teacher[1])
    cosines = [(s * t).sum(dim=-1).mean() for s, t in zip(student, teacher, strict=True)]
    return 1 - (cosines[0] + cosines[1]) / 2
