"""Typed recipe sections, one model a stage. No torch here: a recipe is checked before anything heavy is imported.

Sections stand in the order the data flows. Every optional field defaults to None and is absent from TOML when
unset; what can be switched off has a `kind = "none"`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, Tag, field_validator, model_validator

from evatool.recipe.eval_sections import EvalRecipe as EvalRecipe
from evatool.recipe.eval_sections import EvalSection as EvalSection
from evatool.recipe.eval_sections import FewShotSection as FewShotSection
from evatool.recipe.eval_sections import LinearProbeSection as LinearProbeSection
from evatool.recipe.export_sections import ExportRecipe as ExportRecipe
from evatool.recipe.export_sections import ExportSection as ExportSection
from evatool.recipe.model_sections import ClipInit as ClipInit
from evatool.recipe.model_sections import ClipModelSection as ClipModelSection
from evatool.recipe.model_sections import ImageTowerInit as ImageTowerInit
from evatool.recipe.model_sections import ImageTowerSource as ImageTowerSource
from evatool.recipe.model_sections import MimModelSection as MimModelSection
from evatool.recipe.model_sections import NoInit as NoInit
from evatool.recipe.model_sections import TeacherSection as TeacherSection
from evatool.recipe.model_sections import TextTowerSource as TextTowerSource
from evatool.recipe.model_sections import TowersInit as TowersInit
from evatool.recipe.model_sections import WholeModelInit as WholeModelInit
from evatool.recipe.objective_sections import DistillObjective as DistillObjective
from evatool.recipe.objective_sections import FixedTemperature as FixedTemperature
from evatool.recipe.objective_sections import InfoNceObjective as InfoNceObjective
from evatool.recipe.objective_sections import LearnedTemperature as LearnedTemperature
from evatool.recipe.objective_sections import MimObjective as MimObjective
from evatool.recipe.objective_sections import SigmoidObjective as SigmoidObjective
from evatool.recipe.optim_sections import AdamWSection as AdamWSection
from evatool.recipe.optim_sections import ConstantCooldownSection as ConstantCooldownSection
from evatool.recipe.optim_sections import GroupSection as GroupSection
from evatool.recipe.optim_sections import LambSection as LambSection
from evatool.recipe.optim_sections import OptimSection as OptimSection
from evatool.recipe.optim_sections import ScheduleSection as ScheduleSection
from evatool.recipe.section import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section, by_kind

# ---------------------------------------------------------------------------------------------------- data-prepare


class DrawingsSource(Section):
    """The 6,816 captioned drawings that ship with the package (docs/data.md)."""

    kind: Literal["drawings"] = "drawings"
    num_unseen: NonNegative = 120
    """Concepts removed from training in every set, for the never-seen evaluation."""
    split_seed: int = 0
    """Seed of the never-seen split."""
    max_concepts: Positive | None = None
    """Use only this many concepts, spread evenly over the groups (debug recipes)."""


class FolderSource(Section):
    """A folder of pictures and a caption file."""

    kind: Literal["folder"] = "folder"
    images: Path
    """Folder of pictures, searched recursively."""
    captions: Path
    """CSV, TSV or JSONL, told apart by its suffix; one picture a row."""
    image_column: str = "image"
    """Column (or JSON key) with the picture's path relative to `images`."""
    caption_column: str = "caption"
    """Column (or JSON key) with the caption."""
    encoding: str = "utf-8"
    """Text encoding of the caption file."""
    license: str | None = None
    """Licence of the pictures, for the manifest."""

    @field_validator("encoding")
    @classmethod
    def _encoding_is_known(cls, encoding: str) -> str:
        try:
            "".encode(encoding)  # refuses codecs that are not of text, such as base64, too
        except LookupError as error:
            raise ValueError(f"unknown text encoding {encoding!r}; for instance utf-8, utf-16 or cp1252") from error
        return encoding


class ShardSection(Section):
    """WebDataset shards to write."""

    samples_per_shard: Positive = 1000
    """Samples a tar file."""
    shuffle_seed: int = 0
    """Seed of the order in which samples are written."""
    max_bad_fraction: Fraction = 0.01
    """Pictures and rows that cannot be used, as a share of all: skipped and named up to here, refused beyond."""
    max_pixels: Positive = 89_478_485
    """Largest picture accepted, in pixels, judged by its header (Pillow's warning limit)."""
    contact_sheet_images: Positive = 60
    """Pictures on the contact sheet."""


class DataPrepareRecipe(Section):
    """Pictures and captions to WebDataset shards, evaluation sets, a manifest and a contact sheet."""

    stage: Literal["data-prepare"] = "data-prepare"
    source: str | None = None
    """Where the figures of this recipe come from."""
    run_dir: Path | None = None
    """Output folder; `runs/<recipe name>` when absent."""
    data: Annotated[DrawingsSource | FolderSource, Field(discriminator="kind")]
    shards: ShardSection = ShardSection()


# ---------------------------------------------------------------------------------------------------- shared pieces


class AugmentSection(Section):
    """Random transforms of a training picture. The defaults are EVA-CLIP's: a crop and nothing else (eva.md 3.4)."""

    crop_scale: tuple[PositiveFloat, PositiveFloat] = (0.9, 1.0)
    """Area of the random crop as a share of the picture (low, high)."""
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (0.75, 1.3333333333333333)
    """Aspect ratio of the random crop (low, high)."""
    horizontal_flip: Fraction = 0.0
    """Probability of mirroring left and right."""
    rotate_degrees: NonNegativeFloat = 0.0
    """Largest rotation either way, corners filled with white."""
    color_jitter: NonNegativeFloat = 0.0
    """Strength of random brightness, contrast, saturation and hue changes; 0 is off."""
    grayscale: Fraction = 0.0
    """Probability of dropping the colour."""

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> AugmentSection:
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} = [{low}, {high}] is empty: the first number must not exceed the second")
        return self


class TrainDataSection(Section):
    """Shards to train on."""

    train: Path
    """Folder with shards and their `manifest.json`, as `evatool data-prepare` writes it."""
    caption: Literal["txt", "json-captions"] = "txt"
    """`txt`: the sample's txt member. `json-captions`: one of the `captions` in its json member, drawn each time."""
    augment: AugmentSection = AugmentSection()
    num_workers: NonNegative = 0
    """Loader processes per rank; 0 reads in the training process."""
    max_bad_fraction: Fraction = 0.01
    """Samples that cannot be read, as a share of those tried: replaced and counted up to here, refused beyond."""


class TrainSection(Section):
    """Length, batch and precision."""

    samples_seen: Positive
    """Length of the run in samples."""
    global_batch_size: Positive
    """Samples of one optimiser step over all ranks."""
    seed: int = 0
    """Seed of initialisation, order, augmentation and masks."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass; weights and optimiser stay float32."""
    log_every: Positive = 10
    """Steps between two log lines."""

    @model_validator(mode="after")
    def _at_least_one_step(self) -> TrainSection:
        if self.samples_seen < self.global_batch_size:
            raise ValueError(
                f"samples_seen = {self.samples_seen} is less than one step of "
                f"global_batch_size = {self.global_batch_size}"
            )
        return self

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole run: samples_seen / global_batch_size, rounded down."""
        return self.samples_seen // self.global_batch_size


class CheckpointSection(Section):
    """When the run is saved. The end of a run is always saved."""

    every_steps: Positive | None = None
    """Steps between two saves; only the end when absent."""
    keep: Positive = 2
    """Newest checkpoints kept."""


class EngineSection(Section):
    """How the training step is carried out."""

    kind: Literal["auto", "single", "ddp", "deepspeed"] = "auto"
    """`auto`: `single` in one process, `ddp` in several. `deepspeed`: ZeRO."""
    processes: Positive | None = None
    """Processes to start on this machine; one a GPU, or one without GPUs, when absent. Ignored under torchrun."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """What DeepSpeed divides over ranks: 0 nothing, 1 moments, 2 gradients too, 3 weights too."""

    @model_validator(mode="after")
    def _settings_reach_the_engine(self) -> EngineSection:
        if self.zero_stage > 0 and self.kind != "deepspeed":
            raise ValueError(
                f'zero_stage = {self.zero_stage} has no effect with kind = "{self.kind}": set kind = "deepspeed"'
            )
        if self.kind == "single" and (self.processes or 1) > 1:
            raise ValueError(f'kind = "single" is one process, but processes = {self.processes}: use kind = "ddp"')
        return self


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


# ---------------------------------------------------------------------------------------------------- stages


class PretrainMimRecipe(TrainingRecipe):
    """Masked image modelling against a CLIP teacher's patch features."""

    stage: Literal["pretrain-mim"] = "pretrain-mim"
    model: MimModelSection
    teacher: TeacherSection
    objective: MimObjective = MimObjective()


class TrainClipRecipe(TrainingRecipe):
    """Contrastive image-text training."""

    stage: Literal["train-clip"] = "train-clip"
    model: ClipModelSection
    objective: Annotated[
        Annotated[InfoNceObjective, Tag("infonce")] | Annotated[SigmoidObjective, Tag("sigmoid")], by_kind("infonce")
    ] = InfoNceObjective()

    @model_validator(mode="after")
    def _text_tower_has_settings(self) -> TrainClipRecipe:
        if self.optim.text is None:
            raise ValueError("optim.text is missing: a CLIP model has a text tower, give it at least `lr`")
        return self


class DistillRecipe(TrainingRecipe):
    """A student CLIP learns from the data and from a frozen teacher."""

    stage: Literal["distill"] = "distill"
    model: ClipModelSection
    teacher: TeacherSection
    objective: DistillObjective = DistillObjective()

    @model_validator(mode="after")
    def _text_tower_has_settings(self) -> DistillRecipe:
        if self.optim.text is None:
            raise ValueError("optim.text is missing: a CLIP model has a text tower, give it at least `lr`")
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
