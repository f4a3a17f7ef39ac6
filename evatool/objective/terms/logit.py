"""Logit distillation: the student tells images and captions of the global batch apart as the teacher does.

Source: CLIP-KD's CRD (arXiv 2307.12732); open_clip `DistillClipLoss`
(docs/reference/open-clip-and-clip-benchmark.md#distillation-in-open_clip).
"""

from __future__ import annotations

from evatool.core.batch import Batch
from evatool.objective.base import Features
from evatool.objective.terms.base import LossTerm, TermLoss
from evatool.objective.terms.teaching import teacher_pair, teacher_targets
from evatool.objective.tiled.divergence import sigmoid_divergence, softmax_divergence
from evatool.recipe.schema.distill import Weight
from evatool.teachers.base import Teacher


class LogitTerm(LossTerm):
    """KL divergence from the teacher's to the student's softmax over the global batch.

    Beside a `SigmoidTerm`, which brings the feature `bias`, it is that of every pair's yes or no, and the teacher needs
    a bias too.

    Args:
        temperature: divides both models' similarities (Hinton's, with its square on the loss).
        weight: as in `LossTerm`; the teacher's own weight is a factor on it.
    """

    def __init__(self, teacher: Teacher, temperature: float = 1.0, *, weight: Weight = 1.0) -> None:
        super().__init__(teacher.key("logit_loss"), weight, factor=teacher.weight, weight_name="logit_loss")
        self.teacher, self.temperature = teacher, temperature

    def targets(self, batch: Batch, found: Features) -> Features:
        return teacher_targets(self.teacher, batch, found)

    def loss(self, features: Features, batch: Batch) -> TermLoss:
        student, scale, bias = (features["image"], features["text"]), features["scale"], features.get("bias")
        known = teacher_pair(self.teacher, features), self.teacher.logit_scale
        if bias is None:
            return softmax_divergence(student, scale, *known, self.temperature), {}
        assert self.teacher.bias is not None, "a sigmoid loss's teacher needs a bias"
        return sigmoid_divergence(student, scale, bias, *known, self.teacher.bias, self.temperature), {}
