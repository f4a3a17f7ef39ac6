"""Interactive contrastive learning: the student's images among the teacher's captions, and the reverse.

Source: CLIP-KD's ICL (arXiv 2307.12732).
"""

from __future__ import annotations

from torch import nn

from evatool.core.batch import Batch
from evatool.objective.base import Features
from evatool.objective.terms.base import LossTerm, TermLoss
from evatool.objective.terms.contrastive import Positives, positive_ids
from evatool.objective.terms.teaching import StudentProjection, teacher_pair, teacher_targets
from evatool.objective.tiled.relation import interactive_loss
from evatool.recipe.schema.distill import Weight
from evatool.teachers.base import Teacher


class InteractiveTerm(LossTerm):
    """The contrastive loss between the student's embeddings of one tower and the teacher's of the other.

    It is a sigmoid loss beside a `SigmoidTerm`, which brings the feature `bias`.

    Args:
        projection: carries the student's features to the teacher's width.
        positives: which captions are right.
        weight: as in `LossTerm`; the teacher's own weight is a factor on it.
    """

    def __init__(
        self,
        teacher: Teacher,
        projection: StudentProjection,
        positives: Positives = "pair",
        *,
        weight: Weight = 1.0,
    ) -> None:
        super().__init__(teacher.key("interactive_loss"), weight, factor=teacher.weight, weight_name="interactive_loss")
        self.teacher, self.projection, self.positives = teacher, projection, positives
        projection.add_to(self)

    def encode(self, model: nn.Module, batch: Batch, features: Features) -> Features:
        return self.projection.encode(features)

    def targets(self, batch: Batch, found: Features) -> Features:
        return teacher_targets(self.teacher, batch, found)

    def loss(self, features: Features, batch: Batch) -> TermLoss:
        student, teacher = self.projection.pair(features), teacher_pair(self.teacher, features)
        caption_id = positive_ids(batch, self.positives)
        return interactive_loss(student, teacher, features["scale"], caption_id, features.get("bias")), {}
