"""Relation matching: images lie to each other, and captions to each other, as they do for the teacher.

Source: similarity-preserving distillation (arXiv 1907.09682), on cosines as DINOv3's Gram loss (arXiv 2508.10104).
"""

from __future__ import annotations

from evatool.core.batch import Batch
from evatool.objective.base import Features
from evatool.objective.terms.base import LossTerm, TermLoss
from evatool.objective.terms.teaching import teacher_pair, teacher_targets
from evatool.objective.tiled.relation import relation_loss
from evatool.recipe.schema.distill import Weight
from evatool.teachers.base import Teacher


class RelationTerm(LossTerm):
    """Squared difference of student's and teacher's cosines within each tower, over all pairs of the global batch.

    Args:
        weight: as in `LossTerm`; the teacher's own weight is a factor on it.
    """

    def __init__(self, teacher: Teacher, *, weight: Weight = 1.0) -> None:
        super().__init__(teacher.key("relation_loss"), weight, factor=teacher.weight, weight_name="relation_loss")
        self.teacher = teacher

    def targets(self, batch: Batch, found: Features) -> Features:
        return teacher_targets(self.teacher, batch, found)

    def loss(self, features: Features, batch: Batch) -> TermLoss:
        return relation_loss((features["image"], features["text"]), teacher_pair(self.teacher, features)), {}
