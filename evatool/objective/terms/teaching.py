"""What the losses against one teacher share: its features of the batch, and the student's at its width."""

# B this rank's samples, E student's and T teacher's embedding

from __future__ import annotations

from typing import Literal

from torch import nn

from evatool.core.batch import Batch
from evatool.model.features import FeaturePair, l2_normalize
from evatool.objective.base import Features
from evatool.objective.terms.base import LossTerm
from evatool.teachers.base import Teacher

TOWERS: tuple[Literal["image", "text"], ...] = ("image", "text")


class StudentProjection:
    """One learned linear layer a tower that carries the student's features to the teacher's width; not exported.

    The terms of a teacher that compare embeddings share one. Where the widths are equal there is none to learn.

    Args:
        student_width: E.
    """

    def __init__(self, teacher: Teacher, student_width: int) -> None:
        self._teacher = teacher
        self._layers: dict[str, nn.Linear] = {}
        if teacher.width != student_width:
            self._layers = {tower: nn.Linear(student_width, teacher.width, bias=False) for tower in TOWERS}

    def add_to(self, term: LossTerm) -> None:
        """Declare the layers as parts of a term."""
        prefix = f"{self._teacher.name}_" if self._teacher.name else ""
        for tower, layer in self._layers.items():
            term.add_part(f"{prefix}{tower}_projection", layer)

    def encode(self, features: Features) -> Features:
        """The projected features, unless an earlier term has made them."""
        keys = {tower: self._teacher.key(f"projected_{tower}") for tower in self._layers}
        return {
            key: l2_normalize(self._layers[tower](features[tower]))
            for tower, key in keys.items()
            if key not in features
        }

    def pair(self, features: Features) -> FeaturePair:
        """The student's features (B, T) at the teacher's width."""
        image, text = (features.get(self._teacher.key(f"projected_{tower}"), features[tower]) for tower in TOWERS)
        return image, text


def teacher_targets(teacher: Teacher, batch: Batch, found: Features) -> Features:
    """The teacher's features of the batch, unless an earlier term has asked for them."""
    keys = [teacher.key(f"teacher_{tower}") for tower in TOWERS]
    if keys[0] in found:
        return {}
    return dict(zip(keys, teacher.features(batch), strict=True))


def teacher_pair(teacher: Teacher, features: Features) -> FeaturePair:
    """The teacher's features (B, T) in the student's precision."""
    dtype = features["image"].dtype
    image, text = (features[teacher.key(f"teacher_{tower}")].to(dtype) for tower in TOWERS)
    return image, text
