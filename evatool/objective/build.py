"""The recipe's objective: which losses, on which model, against which teachers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import assert_never, overload

from torch import nn

from evatool.objective.base import Objective
from evatool.objective.clip import ClipObjective
from evatool.objective.mim import MimObjective
from evatool.objective.terms.base import LossTerm
from evatool.objective.terms.contrastive import InfoNceTerm, SigmoidTerm
from evatool.objective.terms.feature import FeatureTerm
from evatool.objective.terms.interactive import InteractiveTerm
from evatool.objective.terms.logit import LogitTerm
from evatool.objective.terms.mim import MimTerm
from evatool.objective.terms.relation import RelationTerm
from evatool.objective.terms.teaching import StudentProjection
from evatool.recipe import schema
from evatool.recipe.schema.distill import is_used
from evatool.teachers.base import PatchStore, PatchTeacher, Teacher

ClipSection = schema.InfoNceObjective | schema.SigmoidObjective | schema.DistillObjective

INITIAL_SCALE, INITIAL_BIAS = 10.0, -10.0
"""A distilled sigmoid loss's first scale and bias where the recipe gives none: those of train-clip's."""


@dataclass(frozen=True)
class PatchTargets:
    """The teacher of masked image modelling, and the shapes that follow from it and from the masks."""

    teacher: PatchTeacher
    predict_dim: int
    """Width of the teacher's features."""
    num_masked: int
    """Most masked patches of an image."""
    width: int
    """Width of the image tower that learns."""
    store: PatchStore | None = None


@overload
def build_objective(
    section: schema.MimObjective, model: nn.Module, *, patches: PatchTargets | None = None
) -> MimObjective: ...
@overload
def build_objective(
    section: ClipSection,
    model: nn.Module,
    *,
    patches: PatchTargets | None = None,
    teachers: Sequence[Teacher] = (),
    context_length: int | None = None,
    embed_dim: int = 0,
) -> ClipObjective: ...
def build_objective(
    section: ClipSection | schema.MimObjective,
    model: nn.Module,
    *,
    patches: PatchTargets | None = None,
    teachers: Sequence[Teacher] = (),
    context_length: int | None = None,
    embed_dim: int = 0,
) -> Objective:
    """The recipe's objective around a model; the random numbers of what it learns itself are drawn here.

    Args:
        section: the recipe's `[objective]`.
        model: the CLIP model, or the student of masked image modelling.
        patches: whose patch features are predicted, where the section has masked image modelling.
        teachers: whose embeddings are learned, where it is a distillation.
        context_length: text tokens of the model, where teachers' captions may be longer.
        embed_dim: width of the model's embedding, where teachers' may be another.
    """
    match section:
        case schema.MimObjective():
            assert patches is not None, "masked image modelling needs a teacher"
            return MimObjective(model, patches.teacher, patches.store)
        case schema.InfoNceObjective() | schema.SigmoidObjective():
            terms = [contrastive_term(section)]
            if section.mim is not None:
                assert patches is not None, "the schema lets no joint objective through without a teacher"
                terms.append(mim_term(section.mim, patches))
            return ClipObjective(model, terms)
        case schema.DistillObjective():
            return ClipObjective(model, distill_terms(section, teachers, embed_dim), context_length=context_length)
        case _:
            assert_never(section)


def contrastive_term(section: schema.InfoNceObjective | schema.SigmoidObjective) -> LossTerm:
    """The contrastive loss of train-clip."""
    match section:
        case schema.InfoNceObjective(temperature=schema.FixedTemperature(value=value)):
            return InfoNceTerm(section.positives, temperature=value)
        case schema.InfoNceObjective():
            return InfoNceTerm(section.positives)
        case schema.SigmoidObjective():
            return SigmoidTerm(section.initial_scale, section.initial_bias, section.positives)


def mim_term(section: schema.JointMim, patches: PatchTargets) -> LossTerm:
    """Masked image modelling beside a contrastive loss."""
    return MimTerm(
        width=patches.width,
        predict_dim=patches.predict_dim,
        num_masked=patches.num_masked,
        teacher=patches.teacher,
        store=patches.store,
        weight=section.weight,
    )


def distill_terms(section: schema.DistillObjective, teachers: Sequence[Teacher], student_width: int) -> list[LossTerm]:
    """The contrastive loss, then for each teacher those losses that have weight at any time of the run."""
    # Projections first: their weights are drawn teacher by teacher.
    needs_width = is_used(section.feature_weight) or is_used(section.interactive_weight)
    widths = {teacher.name: student_width if needs_width else teacher.width for teacher in teachers}
    projections = {teacher.name: StudentProjection(teacher, widths[teacher.name]) for teacher in teachers}
    terms: list[LossTerm] = []
    match section.loss:
        case "infonce":
            terms.append(InfoNceTerm(section.positives, weight=section.contrastive_weight))
        case "sigmoid":
            scale = section.initial_scale or INITIAL_SCALE
            bias = INITIAL_BIAS if section.initial_bias is None else section.initial_bias
            terms.append(SigmoidTerm(scale, bias, section.positives, weight=section.contrastive_weight))
    for teacher in teachers:
        terms.extend(_taught(section, teacher, projections[teacher.name]))
    return terms


def _taught(section: schema.DistillObjective, teacher: Teacher, projection: StudentProjection) -> Iterator[LossTerm]:
    """The losses against one teacher."""
    if is_used(section.feature_weight):
        yield FeatureTerm(teacher, projection, section.feature_loss, weight=section.feature_weight)
    if is_used(section.logit_weight):
        yield LogitTerm(teacher, section.logit_temperature, weight=section.logit_weight)
    if is_used(section.relation_weight):
        yield RelationTerm(teacher, weight=section.relation_weight)
    if is_used(section.interactive_weight):
        yield InteractiveTerm(teacher, projection, section.positives, weight=section.interactive_weight)
