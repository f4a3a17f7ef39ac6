"""The run that is planned: what a recipe says of it, as plain values."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

from evatool.core.batch_shares import samples_per_rank
from evatool.core.bounded_json import read_json
from evatool.core.errors import CheckpointError, EvatoolError, RecipeError, UsageError
from evatool.model.config import ModelConfig, mim_config
from evatool.model.presets import resolve_preset
from evatool.plan.costs import Stage, StepWork, TeacherModel, joint_tower
from evatool.plan.engines import Kind, Offload, Setup
from evatool.plan.locked import Locks
from evatool.plan.memory import Checkpointing
from evatool.plan.traced import traced_timm_model
from evatool.recipe.schema import (
    DistillRecipe,
    JointMim,
    PatchTeacherSection,
    PretrainMimRecipe,
    Recipe,
    TeacherSection,
    TrainClipRecipe,
    TrainingRecipe,
)
from evatool.recipe.schema.teacher import TIMM_PREFIX

CAPTION_COLUMNS = 20
"""Text tokens computed for a web caption: 15 on average, in groups of like length (model/text.py)."""
DEFAULT_PREDICT_DIM = 1024  # EVA-02's teacher; used where the teacher is a folder that is not there yet


@dataclass(frozen=True)
class PlannedJob:
    """One training run on `num_gpus` ranks.

    Attributes:
        stage: "train-clip", "pretrain-mim" or "distill".
        model: configuration.
        teachers: the teachers that run at every step, as far as their shapes are known.
        teacher_widths: of the embeddings that a student is compared with, stored ones among them.
        numerics: a key of `memory.NUMERICS`.
        engine: as recipes name it; `zero_stage` and `offload` are DeepSpeed's.
        accumulation: micro-batches of one optimiser step.
        checkpointing: what blocks recompute in the backward pass.
        patch_dropout, dropout_phases: share of dropped patches at first, and (samples seen, share) from then on.
        text_tokens: tokens a caption on average, padding of its group included; None is the whole context.
        masked: hidden patches of a MIM picture.
        joint: the image tower with its prediction head, where train-clip learns both losses in one stage.
        locks: frozen parts of the towers.
        averages: a moving average of the weights is kept.
        notes: what was assumed on the way from the recipe.
    """

    name: str
    stage: Stage
    model: ModelConfig
    teachers: tuple[TeacherModel, ...]
    samples_seen: int
    global_batch_size: int
    num_gpus: int
    numerics: Literal["fp32", "autocast", "bf16"]
    engine: Kind
    zero_stage: int = 0
    offload: Offload = "none"
    accumulation: int = 1
    checkpointing: Checkpointing = "none"
    optimizer: Literal["adamw", "lamb"] = "adamw"
    patch_dropout: float = 0.0
    dropout_phases: tuple[tuple[int, float], ...] = ()
    text_tokens: int | None = None
    masked: int = 0
    joint: ModelConfig | None = None
    teacher_widths: tuple[int, ...] = ()
    kept_checkpoints: int = 2
    locks: Locks = field(default_factory=Locks)
    averages: bool = False
    notes: tuple[str, ...] = ()

    @property
    def num_steps(self) -> int:
        """Optimiser steps."""
        return self.samples_seen // self.global_batch_size

    @property
    def micro_batch_size(self) -> int:
        """Samples of one forward pass on one rank, rounded up."""
        return -(-self.global_batch_size // (self.num_gpus * self.accumulation))

    @property
    def setup(self) -> Setup:
        """The engine on these ranks."""
        return Setup(self.engine, self.zero_stage, self.offload, self.num_gpus, self.accumulation > 1)

    @property
    def step(self) -> StepWork:
        """What a sample goes through, as `plan.costs` counts it."""
        return StepWork(
            self.stage,
            self.model,
            self.teachers,
            self.masked,
            self.joint,
            self.locks,
            tuple(self.dropout_shares),
            self.text_tokens,
        )

    @property
    def dropout_shares(self) -> list[tuple[float, float]]:
        """(share of the run's samples, share of dropped patches) of each phase."""
        starts = [0, *(min(start, self.samples_seen) for start, _ in self.dropout_phases), self.samples_seen]
        rates = [self.patch_dropout, *(rate for _, rate in self.dropout_phases)]
        spans = zip(pairwise(starts), rates, strict=True)
        return [((end - start) / self.samples_seen, rate) for (start, end), rate in spans]


def job_of_recipe(recipe: Recipe, name: str, num_gpus: int) -> PlannedJob:
    """A training recipe as a job.

    Raises: UsageError for a recipe that trains nothing; RecipeError for an unknown preset, or a batch that does not
        divide over the ranks.
    """
    if not isinstance(recipe, TrainClipRecipe | PretrainMimRecipe | DistillRecipe):
        raise UsageError(
            f"{name} is a recipe for {recipe.stage}: only training is planned",
            expected="a recipe for pretrain-mim, train-clip or distill",
        )
    train = recipe.train
    notes: list[str] = []
    _check_ranks(recipe, num_gpus)
    engine = _engine(recipe.engine.kind, num_gpus)
    model = resolve_preset(recipe.model.preset).with_image_size(recipe.model.image_size)
    known, live = _teachers(recipe, notes)
    job = PlannedJob(
        name=name,
        stage=recipe.stage,
        model=model,
        teachers=live,
        samples_seen=train.samples_seen,
        global_batch_size=train.global_batch_size,
        num_gpus=num_gpus,
        numerics="fp32" if train.precision == "fp32" else "autocast",
        engine=engine,
        zero_stage=recipe.engine.zero_stage,
        offload=recipe.engine.offload,
        accumulation=_accumulation(train.micro_batch_size, train.global_batch_size // num_gpus),
        checkpointing=recipe.engine.activation_checkpointing,
        optimizer=recipe.optim.kind,
        kept_checkpoints=recipe.checkpoint.keep,
        averages=train.ema_decay is not None,
        notes=tuple(notes),
    )
    if isinstance(recipe, PretrainMimRecipe):
        predict = known[0].embed_dim if known else model.predict_dim or DEFAULT_PREDICT_DIM
        rows, columns = model.grid
        return replace(
            job, model=mim_config(model, predict), masked=round(recipe.objective.mask_ratio * rows * columns)
        )
    if model.task != "clip":
        raise RecipeError(f"model.preset = {recipe.model.preset!r} is a MIM model: it has no text tower")
    if isinstance(recipe, TrainClipRecipe) and recipe.objective.mim is not None:
        job = _with_mim(job, recipe.objective.mim, known)
    return replace(
        job,
        locks=Locks(recipe.model.lock.visual, recipe.model.lock.text),
        patch_dropout=recipe.model.patch_dropout,
        dropout_phases=recipe.model.patch_dropout_schedule,
        text_tokens=min(CAPTION_COLUMNS, model.context_length),
        teacher_widths=() if job.joint else tuple(config.embed_dim or 0 for config in known),
        notes=(*notes, f"captions are counted at {CAPTION_COLUMNS} tokens, a web caption's with padding"),
    )


def _check_ranks(recipe: TrainingRecipe, num_gpus: int) -> None:
    """Raises: RecipeError where so many ranks cannot carry out the recipe."""
    samples_per_rank(recipe.train.global_batch_size, num_gpus)
    if recipe.engine.kind == "single" and num_gpus > 1:
        raise RecipeError(
            f'engine.kind = "single" is one process, but --gpus is {num_gpus}', fix='--set engine.kind="fsdp2"'
        )


def _with_mim(job: PlannedJob, section: JointMim, known: tuple[TeacherModel, ...]) -> PlannedJob:
    """The job with a second, masked pass through the image tower."""
    rows, columns = job.model.grid
    predict = (known[0].embed_dim if known else None) or DEFAULT_PREDICT_DIM
    return replace(job, joint=joint_tower(job.model, predict), masked=round(section.mask_ratio * rows * columns))


def _engine(kind: str, num_gpus: int) -> Kind:
    match kind:
        case "auto":
            return "single" if num_gpus == 1 else "fsdp2"
        case "ddp" if num_gpus == 1:
            return "single"
        case _:
            return kind  # type: ignore[return-value]


def _accumulation(micro_batch_size: int | None, samples: int) -> int:
    """Micro-batches of a rank's `samples`."""
    return 1 if micro_batch_size is None else -(-samples // micro_batch_size)


def _teachers(
    recipe: PretrainMimRecipe | TrainClipRecipe | DistillRecipe, notes: list[str]
) -> tuple[tuple[TeacherModel, ...], tuple[TeacherModel, ...]]:
    """All teachers whose shape is known, and those of them that run at every step; `notes` says what is left out."""
    sections: list[TeacherSection] = []
    if isinstance(recipe, DistillRecipe):
        sections = list(recipe.all_teachers.values())
    elif recipe.teacher is not None:
        sections = [recipe.teacher]
    known: list[TeacherModel] = []
    live: list[TeacherModel] = []
    for section in sections:
        config, note = _teacher(section)
        notes += [note] if note else []
        if config is None:
            continue
        known.append(config)
        if section.store is None:
            live.append(config)
        else:
            notes.append(f"what {section.model} says is stored: only the first {section.store.views} epochs run it")
    return tuple(known), tuple(live)


def _teacher(section: TeacherSection) -> tuple[TeacherModel | None, str | None]:
    """The teacher's architecture, and what to say of where its figures come from, or of why there are none."""
    if not (isinstance(section, PatchTeacherSection) and section.is_timm):
        return teacher_config(section.model)
    name = section.model.removeprefix(TIMM_PREFIX)
    note = f"what {section.model} costs was counted on its layers without weights: there is no formula for it"
    return traced_timm_model(name, section.layer, section.image_size), note


def teacher_config(name: str) -> tuple[ModelConfig | None, str | None]:
    """The teacher's configuration, and what to say where it is not known: a folder may not be there yet."""
    if name.startswith(TIMM_PREFIX):
        return None, f"the teacher {name} is not a CLIP: its memory and its work are not counted"
    path = Path(name)
    found = sorted(path.glob("checkpoints/step_*/model_config.json")) + sorted(path.glob("model_config.json"))
    if found:
        try:
            return ModelConfig.from_json(read_json(found[-1])), None
        except (OSError, ValueError) as error:
            what = f"the teacher's {found[-1].name} cannot be read: {error}"
            raise CheckpointError(what, where=str(found[-1])) from error
    for spelling in (path.stem if path.suffix else name, *_published_names(path.name)):
        try:
            return resolve_preset(spelling), None
        except EvatoolError:
            continue
    return None, f"the teacher {name} is not there yet: its memory and its work are not counted"


def _published_names(file: str) -> list[str]:
    """Models that a released file may be called after: `EVA02_CLIP_E_psz14_plus_s9B.pt`, `openai-ViT-L-14.pt`."""
    trained = re.sub(r"_s\d+B.*$", "", file)
    found = re.match(r"(?:openai|open_clip)-(ViT-\w+-\d+)", file)
    return [trained, re.sub(r"_psz\d+", "", trained)] + ([found[1]] if found else [])
