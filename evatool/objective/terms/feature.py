"""Feature matching: the student's embedding of each image and caption is the teacher's.

Source: CLIP-KD's FD (arXiv 2307.12732).
"""

# B this rank's samples, T teacher's embedding

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from evatool.core.batch import Batch
from evatool.model.features import FeaturePair
from evatool.objective.base import Features
from evatool.objective.terms.base import LossTerm, TermLoss
from evatool.objective.terms.teaching import StudentProjection, teacher_pair, teacher_targets
from evatool.recipe.schema.distill import Weight
from evatool.teachers.base import Teacher


class FeatureTerm(LossTerm):
    """The distance between student and teacher features of both towers.

    Args:
        projection: carries the student's features to the teacher's width.
        kind: as in `feature_loss`.
        weight: as in `LossTerm`; the teacher's own weight is a factor on it.
    """

    def __init__(
        self,
        teacher: Teacher,
        projection: StudentProjection,
        kind: Literal["cosine", "mse"] = "cosine",
        *,
        weight: Weight = 1.0,
    ) -> None:
        super().__init__(teacher.key("feature_loss"), weight, factor=teacher.weight, weight_name="feature_loss")
        self.teacher, self.projection, self.kind = teacher, projection, kind
        projection.add_to(self)

    def encode(self, model: nn.Module, batch: Batch, features: Features) -> Features:
        return self.projection.encode(features)

    def targets(self, batch: Batch, found: Features) -> Features:
        return teacher_targets(self.teacher, batch, found)

    def loss(self, features: Features, batch: Batch) -> TermLoss:
        return feature_loss(self.projection.pair(features), teacher_pair(self.teacher, features), self.kind), {}


def feature_loss(student: FeaturePair, teacher: FeaturePair, kind: str = "cosine") -> Tensor:
    """The distance between student and teacher features, averaged over this rank's samples; no collective is called.

    Args:
        student, teacher: (image, text) features (B, T) of unit length.
        kind: "cosine" for 1 - cosine averaged over both towers, in [0, 2]; "mse" for the mean squared difference of
            elements, both towers added, as CLIP-KD's FD.
    """
    if kind == "mse":
        return F.mse_loss(student[0], teacher[0]) + F.mse_loss(student[1], teacher[1])
    cosines = [(s * t).sum(dim=-1).mean() for s, t in zip(student, teacher, strict=True)]
    return 1 - (cosines[0] + cosines[1]) / 2
