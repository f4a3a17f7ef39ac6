"""Distillations small enough to differentiate in float64 in milliseconds."""

from __future__ import annotations

from tiny_clip import TinyTeacher, tiny_clip

from evatool.objective.build import build_objective
from evatool.objective.clip import ClipObjective
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


def section_of(kind: str) -> schema.DistillObjective:
    """The recipe's section of a distillation of this kind."""
    if kind == "distill":
        return schema.DistillObjective(positives="equal-captions")
    return schema.DistillObjective(**EVERYTHING, loss="sigmoid" if "sigmoid" in kind else "infonce")


def teachers_of(objective: ClipObjective) -> list[Teacher]:
    """The teachers of an objective's terms, each once."""
    return list({id(term.teacher): term.teacher for term in objective.terms if hasattr(term, "teacher")}.values())


def tiny_distillation(kind: str) -> ClipObjective:
    """A float64 student of width 8; its teachers are of widths 6 and 8, one with another context."""
    small, large = (tiny_clip(seed=seed, width=width).double() for seed, width in ((1, 6), (2, 8)))
    if kind == "distill":
        teachers = [Teacher(TinyTeacher(small, context_length=12), width=6)]
    else:
        is_sigmoid = "sigmoid" in kind
        biases = (-3.0, -5.0) if is_sigmoid else (None, None)
        teachers = [
            Teacher(TinyTeacher(small, context_length=12), 6, "small", weight=0.5, scale=9.0, bias=biases[0]),
            Teacher(TinyTeacher(large, context_length=9), 8, "large", bias=biases[1]),
        ]
    return build_objective(section_of(kind), tiny_clip(), teachers=teachers, context_length=12, embed_dim=8).double()
