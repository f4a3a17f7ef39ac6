"""Typed recipe sections, one model a stage. No torch here: a recipe is checked before anything heavy is imported.

Sections stand in the order the data flows. Every optional field defaults to None and is absent from TOML when
unset; what can be switched off has a `kind = "none"`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Tag, model_validator

from evatool.recipe.schema.base import Section, by_kind
from evatool.recipe.schema.data import (
    DataPrepareRecipe,
    TrainDataSection,
)
from evatool.recipe.schema.distill import (
    DistillObjective,
    DistillTeacherSection,
    TeacherName,
    check_teachers,
    with_store_paths,
)
from evatool.recipe.schema.engine import EngineSection
from evatool.recipe.schema.eval import EvalRecipe
from evatool.recipe.schema.export import ExportRecipe
from evatool.recipe.schema.joint import check_joint
from evatool.recipe.schema.mim import ImagesSection, ValidationSection
from evatool.recipe.schema.model import (
    ClipModelSection,
    MimModelSection,
)
from evatool.recipe.schema.objective import (
    InfoNceObjective,
    MimObjective,
    SigmoidObjective,
)
from evatool.recipe.schema.optim import (
    AdamWSection,
    ConstantCooldownSection,
    LambSection,
    ScheduleSection,
)
from evatool.recipe.schema.teacher import PatchTeacherSection
from evatool.recipe.schema.train import CheckpointSection, EvaluateSection, TrainSection

# ---------------------------------------------------------------------------------------------------- shared pieces


class TrainingRecipe(Section):
    """What every training stage has."""

    source: str | None = None
    """Where the figures of this recipe come from."""
    run_dir: Path | None = None
    """Run folder; `runs/<recipe name>` when absent."""
    data: TrainDataSection
    optim: Annotated[Annotated[AdamWSection, Tag("adamw")] | Annotated[LambSection, Tag("lamb")], by_kind("adamw")]
    schedule: Annotated[
        Annotated[ScheduleSection, Tag("warmup-cosine")] | Annotated[ConstantCooldownSection, Tag("constant-cooldown")],
        by_kind("warmup-cosine"),
    ] = ScheduleSection()
    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
    engine: EngineSection = EngineSection()

    @model_validator(mode="after")
    def _offload_has_its_optimizer(self) -> TrainingRecipe:
        if self.engine.offload != "none" and self.optim.kind != "adamw":
            raise ValueError(
                f'engine.offload = "{self.engine.offload}" works with AdamW only, but '
                f'optim.kind = "{self.optim.kind}": set engine.offload = "none", or divide more with '
                'engine.zero_stage = 3 or engine.kind = "fsdp2"'
            )
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> TrainingRecipe:
        if self.schedule.warmup_samples > self.train.samples_seen:
            raise ValueError(
                f"schedule.warmup_samples = {self.schedule.warmup_samples} is longer than the run: "
                f"train.samples_seen = {self.train.samples_seen}"
            )
        cooldown = self.schedule.cooldown_samples if self.schedule.kind == "constant-cooldown" else 0
        if self.schedule.warmup_samples + cooldown > self.train.samples_seen:
            raise ValueError(
                f"schedule.warmup_samples = {self.schedule.warmup_samples} and schedule.cooldown_samples = {cooldown} "
                f"together are longer than the run: train.samples_seen = {self.train.samples_seen}"
            )
        return self


def check_logged(key: str, every_steps: int, train: TrainSection) -> None:
    """ValueError where figures of every so many steps would be made on steps whose figures are not written."""
    logged = train.log_every
    if every_steps % logged:
        near = sorted({max(1, every_steps // logged) * logged, -(-every_steps // logged) * logged})
        raise ValueError(
            f"{key} = {every_steps} is no multiple of train.log_every = {logged}, and figures are written "
            f"on those steps only; nearest that are: {', '.join(map(str, near))}"
        )


# ---------------------------------------------------------------------------------------------------- stages


class PretrainMimRecipe(TrainingRecipe):
    """Masked image modelling against a frozen teacher's patch features."""

    stage: Literal["pretrain-mim"] = "pretrain-mim"
    model: MimModelSection
    teacher: PatchTeacherSection
    objective: MimObjective = MimObjective()
    images: ImagesSection = ImagesSection()
    """Sheets of pictures while it learns."""
    validation: ValidationSection | None = None
    """Loss on held-out pictures while it learns; none when absent."""

    @model_validator(mode="after")
    def _validations_are_logged(self) -> PretrainMimRecipe:
        check_logged("validation.every_steps", self.validation.every_steps if self.validation else 0, self.train)
        return self


class ClipTrainingRecipe(TrainingRecipe):
    """What the stages have that train a CLIP model."""

    model: ClipModelSection
    evaluate: EvaluateSection | None = None
    """Zero-shot evaluation while the model trains; none when absent."""

    @model_validator(mode="after")
    def _text_tower_has_settings(self) -> ClipTrainingRecipe:
        if self.optim.text is None:
            raise ValueError("optim.text is missing: a CLIP model has a text tower, give it at least `lr`")
        return self

    @model_validator(mode="after")
    def _evaluations_are_logged(self) -> ClipTrainingRecipe:
        check_logged("evaluate.every_steps", self.evaluate.every_steps if self.evaluate else 0, self.train)
        return self


class TrainClipRecipe(ClipTrainingRecipe):
    """Contrastive image-text training."""

    stage: Literal["train-clip"] = "train-clip"
    objective: Annotated[
        Annotated[InfoNceObjective, Tag("infonce")] | Annotated[SigmoidObjective, Tag("sigmoid")], by_kind("infonce")
    ] = InfoNceObjective()
    teacher: PatchTeacherSection | None = None
    """Whose patch features `[objective.mim]` predicts; absent without it."""

    @model_validator(mode="after")
    def _joint_mim_fits(self) -> TrainClipRecipe:
        check_joint(self.objective.mim, self.teacher, self.model)
        return self


class DistillRecipe(ClipTrainingRecipe):
    """A student CLIP learns from the data and from one or several frozen teachers."""

    stage: Literal["distill"] = "distill"
    teacher: DistillTeacherSection | None = None
    """The only teacher; absent where there are several."""
    teachers: dict[TeacherName, DistillTeacherSection] | None = None
    """Several teachers, each in a table of its own: `[teachers.big]`."""
    objective: DistillObjective = DistillObjective()

    @property
    def all_teachers(self) -> dict[str, DistillTeacherSection]:
        """By name, the only one has none; each with the folder of its store."""
        return with_store_paths(check_teachers(self.teacher, self.teachers, self.objective), self.data)

    @model_validator(mode="after")
    def _teachers_are_what_is_needed(self) -> DistillRecipe:
        check_teachers(self.teacher, self.teachers, self.objective)
        return self


Recipe = DataPrepareRecipe | PretrainMimRecipe | TrainClipRecipe | DistillRecipe | ExportRecipe | EvalRecipe

RECIPES: dict[str, type[Recipe]] = {
    "data-prepare": DataPrepareRecipe,
    "pretrain-mim": PretrainMimRecipe,
    "train-clip": TrainClipRecipe,
    "distill": DistillRecipe,
    "export": ExportRecipe,
    "eval": EvalRecipe,
}
"""Recipe model by stage name, in pipeline order."""
