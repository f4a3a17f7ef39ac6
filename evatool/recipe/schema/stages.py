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
    """Sections that every training stage has."""

    source: str | None = None
    """Text that says where the values of this recipe come from. It is shown by `evatool recipe list` and changes
    nothing."""
    run_dir: Path | None = None
    """Folder of the run. It is `runs/<recipe name>` when absent."""
    data: TrainDataSection
    """Shards to train on."""
    optim: Annotated[Annotated[AdamWSection, Tag("adamw")] | Annotated[LambSection, Tag("lamb")], by_kind("adamw")]
    """Optimiser, and its settings by tower."""
    schedule: Annotated[
        Annotated[ScheduleSection, Tag("warmup-cosine")] | Annotated[ConstantCooldownSection, Tag("constant-cooldown")],
        by_kind("warmup-cosine"),
    ] = ScheduleSection()
    """Course of the learning rate over the run."""
    train: TrainSection
    """Length, batch and precision of the run."""
    checkpoint: CheckpointSection = CheckpointSection()
    """When the run is saved."""
    engine: EngineSection = EngineSection()
    """How the step is carried out over processes and devices."""

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
    """Masked image modelling: an image encoder learns a frozen teacher's patch features at places it does not see."""

    stage: Literal["pretrain-mim"] = "pretrain-mim"
    """Stage that this recipe is for. The commands of other stages refuse it."""
    model: MimModelSection
    """Image encoder that learns."""
    teacher: PatchTeacherSection
    """Frozen model whose patch features are learned."""
    objective: MimObjective = MimObjective()
    """Masks of the student."""
    images: ImagesSection = ImagesSection()
    """Sheets of pictures that are drawn while it learns."""
    validation: ValidationSection | None = None
    """Loss on held-out pictures while it learns. None is computed when it is absent."""

    @model_validator(mode="after")
    def _validations_are_logged(self) -> PretrainMimRecipe:
        check_logged("validation.every_steps", self.validation.every_steps if self.validation else 0, self.train)
        return self


class ClipTrainingRecipe(TrainingRecipe):
    """Sections of the stages that train a CLIP model."""

    model: ClipModelSection
    """CLIP model that learns."""
    evaluate: EvaluateSection | None = None
    """Zero-shot evaluation while the model trains. There is none when it is absent."""

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
    """Contrastive training of a CLIP model on pictures and captions."""

    stage: Literal["train-clip"] = "train-clip"
    """Stage that this recipe is for. The commands of other stages refuse it."""
    objective: Annotated[
        Annotated[InfoNceObjective, Tag("infonce")] | Annotated[SigmoidObjective, Tag("sigmoid")], by_kind("infonce")
    ] = InfoNceObjective()
    """Contrastive loss, alone or with masked image modelling beside it."""
    teacher: PatchTeacherSection | None = None
    """Frozen model whose patch features `[objective.mim]` predicts. It is absent without that table."""

    @model_validator(mode="after")
    def _joint_mim_fits(self) -> TrainClipRecipe:
        check_joint(self.objective.mim, self.teacher, self.model)
        return self


class DistillRecipe(ClipTrainingRecipe):
    """Distillation: a student CLIP learns from the data and from one or several frozen teachers."""

    stage: Literal["distill"] = "distill"
    """Stage that this recipe is for. The commands of other stages refuse it."""
    teacher: DistillTeacherSection | None = None
    """The only teacher. It is absent where there are several."""
    teachers: dict[TeacherName, DistillTeacherSection] | None = None
    """Several teachers, each in a table of its own such as `[teachers.big]`. They take the place of `[teacher]`."""
    objective: DistillObjective = DistillObjective()
    """Losses and their weights."""

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
