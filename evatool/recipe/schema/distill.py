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
    """Factor on the weights of all that is learned from this teacher."""
    temperature: Annotated[float, Field(ge=0.001, le=1.0)] | None = None
    """What its cosines are divided by; its own temperature when absent."""
    bias: float | None = None
    """Added to its scaled similarities in a sigmoid loss's logit distillation, which needs it: about -ln(batch) for a
    teacher trained with a softmax, its learned bias for one trained with a sigmoid loss."""


class DistillObjective(Section):
    """Contrastive loss plus what the student learns from each teacher, each part with its own weight.

    A weight is a number, or `[[samples_seen, weight], ...]`: linear between the points, constant before and after.
    """

    kind: Literal["distill"] = "distill"
    loss: Literal["infonce", "sigmoid"] = "infonce"
    """Of the similarities: softmax over the batch, or a yes-or-no question for every pair (`train-clip`'s two). Said of
    the contrastive, the logit and the interactive part at once."""
    positives: Literal["pair", "equal-captions"] = "pair"
    """As in the contrastive loss."""
    initial_scale: Annotated[float, Field(ge=1.0, le=100.0)] | None = None
    """As in train-clip's sigmoid loss, and only with it; 10 when absent."""
    initial_bias: float | None = None
    """As in train-clip's sigmoid loss, and only with it; -10 when absent."""
    contrastive_weight: Weight = 1.0
    """Weight of the contrastive loss."""
    feature_weight: Weight = 1.0
    """Weight of feature matching between student and teacher features of both towers; where their widths differ, a
    learned projection carries the student's to the teacher's."""
    feature_loss: Literal["cosine", "mse"] = "cosine"
    """`cosine`: 1 - cosine, averaged over both towers. `mse`: CLIP-KD's squared difference of unit vectors, a mean over
    elements and the sum of both towers: 4 / T of the other one at width T, so its weights are in the thousands."""
    logit_weight: Weight = 1.0
    """Weight of the KL divergence from the teacher's to the student's softmax, averaged over both directions."""
    logit_temperature: PositiveFloat = 1.0
    """Divides both models' similarities before that softmax (Hinton's temperature, with its factor T^2 on the loss)."""
    relation_weight: Weight = 0.0
    """Weight of relation matching: squared difference of cosines within a tower, over all pairs of the batch."""
    interactive_weight: Weight = 0.0
    """Weight of the contrastive loss of student pictures against teacher captions, and the reverse."""

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
