"""Distillations small enough to differentiate in float64 in milliseconds."""

from __future__ import annotations

from tiny_clip import TinyTeacher, tiny_clip

from evatool.objective.distill import DistillObjective
from evatool.recipe import schema
from evatool.teachers.base import Teacher

DISTILLATIONS = ["distill", "distill, all parts, two teachers", "distill, sigmoid, two teachers"]
EVERYTHING = {
    "positives": "equal-captions",
    "feature_loss": "mse",
    "feature_weight": 3.0,
    "relation_weight": 2.0,
    "interactive_weight": 0.5,
    "logit_temperature": 2.0,
}


def tiny_distillation(kind: str) -> DistillObjective:
    """A float64 student of width 8; its teachers are of widths 6 and 8, one with another context."""
    small, large = (tiny_clip(seed=seed, width=width).double() for seed, width in ((1, 6), (2, 8)))
    if kind == "distill":
        section = schema.DistillObjective(positives="equal-captions")
        teachers = [Teacher(TinyTeacher(small, context_length=12), width=6)]
    else:
        is_sigmoid = "sigmoid" in kind
        section = schema.DistillObjective(**EVERYTHING, loss="sigmoid" if is_sigmoid else "infonce")
        biases = (-3.0, -5.0) if is_sigmoid else (None, None)
        teachers = [
            Teacher(TinyTeacher(small, context_length=12), 6, "small", weight=0.5, scale=9.0, bias=biases[0]),
            Teacher(TinyTeacher(large, context_length=9), 8, "large", bias=biases[1]),
        ]
    return DistillObjective(tiny_clip(), teachers, section, context_length=12, student_width=8).double()
