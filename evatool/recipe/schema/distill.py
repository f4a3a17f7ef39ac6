"""What a student learns from its teachers: teachers, losses, and their weights over the run. No torch."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from evatool.recipe.schema.base import NonNegative, NonNegativeFloat, PositiveFloat, Section
from evatool.recipe.schema.data import TrainDataSection
from evatool.recipe.schema.teacher import TeacherSection, store_path

EMBEDDINGS = "embeddings"
"""Folder of the only teacher's store below `teacher-features`, where the recipe names none."""

WeightPoints = tuple[tuple[NonNegative, NonNegativeFloat], ...]
"""(samples seen, weight): linear in between, constant before the first and after the last."""


def _rising(points: WeightPoints) -> WeightPoints:
    starts = [start for start, _ in points]
    if len(points) < 2 or starts != sorted(set(starts)):
        raise ValueError(
            f"a weight that changes needs two or more [samples_seen, weight] points in rising order, not {starts}; "
            "one that stays is a number"
        )
    return points


Weight = NonNegativeFloat | Annotated[WeightPoints, AfterValidator(_rising)]
"""A number, or points between which it is linear."""


def weight_at(weight: float | WeightPoints, samples_seen: int) -> float:
    """A loss's weight after so many samples of the run."""
    if not isinstance(weight, tuple):
        return weight
    if samples_seen <= weight[0][0]:
        return weight[0][1]
    for (start, first), (end, last) in pairwise(weight):
        if samples_seen <= end:
            return first + (last - first) * (samples_seen - start) / (end - start)
    return weight[-1][1]


def is_used(weight: float | WeightPoints) -> bool:
    """Whether a loss has weight at any time of the run."""
    return any(part > 0 for _, part in weight) if isinstance(weight, tuple) else weight > 0


TeacherName = Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")]
"""As it stands in logs and in the names of its projections."""


class DistillTeacherSection(TeacherSection):
    """A frozen CLIP model that a student learns from."""

    weight: PositiveFloat = 1.0
    """Factor on the weights of all that is learned from this teacher. It only matters where there are several teachers:
    lower it for the weaker one."""
    temperature: Annotated[float, Field(ge=0.001, le=1.0)] | None = None
    """Number that the teacher's cosines are divided by in logit distillation. Its own temperature is used when absent.
    """
    bias: float | None = None
    """Number added to the teacher's scaled similarities where logits are distilled with `loss = "sigmoid"`, which needs
    it. Take about -ln(batch) for a teacher that was trained with a softmax, and the learned bias for one that was
    trained with a sigmoid loss."""


class DistillObjective(Section):
    """Contrastive loss plus what the student learns from each teacher, each part with its own weight.

    A weight is a number, or `[[samples_seen, weight], ...]`: linear between the points, constant before the first and
    after the last.
    """

    kind: Literal["distill"] = "distill"
    """Selects distillation, the only objective of this stage."""
    loss: Literal["infonce", "sigmoid"] = "infonce"
    """Form in which similarities are compared, in the contrastive, the logit and the interactive part at once.
    `infonce` is a softmax over the global batch; `sigmoid` asks a yes-or-no question about every pair. They are the two
    objectives of `train-clip`."""
    positives: Literal["pair", "equal-captions"] = "pair"
    """Captions that count as right for a picture in the contrastive part. `pair` is only its own; `equal-captions` is
    every equal caption in the batch, which suits sets in which captions repeat."""
    initial_scale: Annotated[float, Field(ge=1.0, le=100.0)] | None = None
    """Factor on the cosines at the start, only with `loss = "sigmoid"`. It is 10 when absent, as in `train-clip`'s
    sigmoid loss, and is learned."""
    initial_bias: float | None = None
    """Number added to the similarities at the start, only with `loss = "sigmoid"`. It is -10 when absent, as in
    `train-clip`'s sigmoid loss, and is learned."""
    contrastive_weight: Weight = 1.0
    """Weight of the contrastive loss on the data itself. Set it to 0 to learn from the teachers alone."""
    feature_weight: Weight = 1.0
    """Weight of feature matching, in which the student's embeddings of pictures and captions approach the teacher's.
    Where their widths differ, a learned projection carries the student's embedding to the teacher's width."""
    feature_loss: Literal["cosine", "mse"] = "cosine"
    """Form of feature matching. `cosine` is 1 - cosine, averaged over both towers. `mse` is CLIP-KD's squared
    difference of unit vectors, a mean over elements and a sum over both towers: it is 4 / T times the other one at
    width T, so its weight has to be in the thousands."""
    logit_weight: Weight = 1.0
    """Weight of logit distillation. With `loss = "infonce"` it is the KL divergence from the teacher's softmax over the
    global batch to the student's, averaged over both directions; with `sigmoid` the divergence of their answers for
    every pair."""
    logit_temperature: PositiveFloat = 1.0
    """Number that divides both models' similarities before that softmax; the loss is multiplied by its square (Hinton's
    temperature). Values above 1 soften both, so that wrong captions of high similarity count more. It has no effect
    while `logit_weight` is 0."""
    relation_weight: Weight = 0.0
    """Weight of relation matching, the squared difference between student and teacher in the cosines of two pictures,
    and of two captions, over all pairs of the batch. It is off by default; it needs no projection where widths differ.
    """
    interactive_weight: Weight = 0.0
    """Weight of the contrastive loss of the student's pictures against the teacher's captions, and of its captions
    against the teacher's pictures (CLIP-KD). It is off by default."""

    @property
    def weights(self) -> dict[str, float | WeightPoints]:
        """By the loss's name in the log."""
        return {
            "contrastive_loss": self.contrastive_weight,
            "feature_loss": self.feature_weight,
            "logit_loss": self.logit_weight,
            "relation_loss": self.relation_weight,
            "interactive_loss": self.interactive_weight,
        }

    @property
    def changing_weights(self) -> frozenset[str]:
        """Names of the losses whose weight is not the same over the run."""
        return frozenset(name for name, weight in self.weights.items() if isinstance(weight, tuple))

    @model_validator(mode="after")
    def _something_is_taught(self) -> DistillObjective:
        taught = {name: weight for name, weight in self.weights.items() if name != "contrastive_loss"}
        if not any(is_used(weight) for weight in taught.values()):
            fields = ", ".join(name.replace("_loss", "_weight") for name in taught)
            raise ValueError(f"{fields} are all 0: nothing is distilled; use train-clip instead")
        return self

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> DistillObjective:
        if self.loss != "sigmoid" and not (self.initial_scale is None and self.initial_bias is None):
            raise ValueError(
                'initial_scale and initial_bias are a sigmoid loss\'s: set loss = "sigmoid", or leave them out'
            )
        if self.logit_temperature != 1.0 and not is_used(self.logit_weight):
            raise ValueError("logit_temperature has no effect while logit_weight is 0: raise that, or leave it out")
        if self.feature_loss != "cosine" and not is_used(self.feature_weight):
            raise ValueError("feature_loss has no effect while feature_weight is 0: raise that, or leave it out")
        return self


def check_teachers(
    teacher: DistillTeacherSection | None,
    teachers: dict[str, DistillTeacherSection] | None,
    objective: DistillObjective,
) -> dict[str, DistillTeacherSection]:
    """All teachers by name, the only one without; ValueError where they are not what the objective needs."""
    if (teacher is None) == (not teachers):
        raise ValueError(
            'both teacher and teachers are given: leave one out (a recipe drops its base\'s with unset = ["teacher"])'
            if teachers
            else "there is no teacher: give [teacher] with its model, or [teachers.NAME] for each of several"
        )
    found = {"": teacher} if teacher is not None else dict(teachers or {})
    _check_stores(found)
    needs_bias = objective.loss == "sigmoid" and is_used(objective.logit_weight)
    for name, section in found.items():
        where = f"teachers.{name}" if name else "teacher"
        if needs_bias and section.bias is None:
            raise ValueError(
                f'{where}.bias is missing: with loss = "sigmoid" the teacher answers for every pair, and needs one; '
                "give about -ln(batch) for a teacher trained with a softmax, or set objective.logit_weight = 0"
            )
        if section.bias is not None and not needs_bias:
            raise ValueError(
                f'{where}.bias is part of logit distillation with objective.loss = "sigmoid" alone: leave it out'
            )
        if section.temperature is not None and not is_used(objective.logit_weight):
            raise ValueError(f"{where}.temperature has no effect while objective.logit_weight is 0: leave it out")
    return found


def with_store_paths(
    teachers: dict[str, DistillTeacherSection], data: TrainDataSection
) -> dict[str, DistillTeacherSection]:
    """The same with the folder of each store where it can be told: a folder of the teacher's own in the usual one."""
    found = {}
    for name, section in teachers.items():
        usual = None if section.store is None or section.store.path else store_path(section.store, data)
        if section.store is not None and usual is not None:
            store = section.store.model_copy(update={"path": usual / (name or EMBEDDINGS)})
            section = section.model_copy(update={"store": store})
        found[name] = section
    return found


def _check_stores(teachers: dict[str, DistillTeacherSection]) -> None:
    """One loader serves all teachers: their stores are of the same views. ValueError otherwise."""
    stores = {name: section.store for name, section in teachers.items() if section.store is not None}
    if not stores:
        return
    without = sorted(set(teachers) - set(stores))
    if without:
        raise ValueError(
            f"teachers.{without[0]} has no store, but teachers.{min(stores)} has one: store what all of them say, or "
            "of none"
        )
    draws = {name: (store.views, store.seed) for name, store in stores.items()}
    if len(set(draws.values())) > 1:
        said = "; ".join(f"teachers.{name}: views = {views}, seed = {seed}" for name, (views, seed) in draws.items())
        raise ValueError(f"stores of several teachers are of other views: {said}; give all the same views and seed")
    paths = [store.path for store in stores.values() if store.path is not None]
    if len(set(paths)) < len(paths):
        raise ValueError(f"two teachers share the store {max(paths, key=paths.count)}: give each a folder of its own")
