"""The run that is planned: what a recipe says of it, as plain values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from evatool.errors import EvatoolError, RecipeError, UsageError
from evatool.model.config import ModelConfig, mim_config
from evatool.model.presets import resolve_preset
from evatool.recipe.schema import DistillRecipe, PretrainMimRecipe, Recipe, TrainClipRecipe

DEFAULT_PREDICT_DIM = 1024  # EVA-02's teacher; used where the teacher is a folder that is not there yet


@dataclass(frozen=True)
class Job:
    """One training run on `num_gpus` ranks.

    Attributes:
        stage: "train-clip", "pretrain-mim" or "distill".
        model, teacher: configurations; the teacher is None where there is none, or its shape is not known.
        numerics: a key of `memory.NUMERICS`.
        engine: "single", "ddp" or "zero", with `zero_stage` for the last.
        accumulation: micro-batches of one optimiser step.
        checkpointing: recompute whole blocks in the backward pass.
        text_tokens: tokens of a trimmed batch of captions; None is the whole context.
        masked: hidden patches of a MIM picture.
        notes: what was assumed on the way from the recipe.
    """

    name: str
    stage: Literal["train-clip", "pretrain-mim", "distill"]
    model: ModelConfig
    teacher: ModelConfig | None
    samples_seen: int
    global_batch_size: int
    num_gpus: int
    numerics: Literal["fp32", "autocast", "bf16"]
    engine: Literal["single", "ddp", "zero"]
    zero_stage: int = 0
    accumulation: int = 1
    checkpointing: bool = False
    patch_dropout: float = 0.0
    text_tokens: int | None = None
    masked: int = 0
    distils_logits: bool = False
    kept_checkpoints: int = 2
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
    def is_zero(self) -> bool:
        """Whether DeepSpeed runs it."""
        return self.engine == "zero"


def job_of_recipe(recipe: Recipe, name: str, num_gpus: int) -> Job:
    """A training recipe as a job.

    Raises: UsageError for a recipe that trains nothing; RecipeError for an unknown preset, or a batch that does not
        divide over the ranks.
    """
    if not isinstance(recipe, TrainClipRecipe | PretrainMimRecipe | DistillRecipe):
        raise UsageError(
            f"{name} is a recipe for {recipe.stage}: only training is planned",
            expected="a recipe for pretrain-mim, train-clip or distill",
        )
    train, notes = recipe.train, []
    if train.global_batch_size % num_gpus:
        near = [n for n in (train.global_batch_size // num_gpus * num_gpus,) if n] + [
            -(-train.global_batch_size // num_gpus) * num_gpus
        ]
        raise RecipeError(
            f"train.global_batch_size = {train.global_batch_size} does not divide over {num_gpus} ranks",
            expected="nearest that do: " + ", ".join(map(str, near)),
        )
    if recipe.engine.kind == "single" and num_gpus > 1:
        raise RecipeError(
            f'engine.kind = "single" is one process, but --gpus is {num_gpus}', fix='--set engine.kind="fsdp2"'
        )
    # fsdp2 divides what ZeRO-3 divides; it needs less by the second copy of float32 weights that ZeRO keeps.
    is_fsdp2 = recipe.engine.kind == "fsdp2" or (recipe.engine.kind == "auto" and num_gpus > 1)
    is_zero = is_fsdp2 or recipe.engine.kind == "deepspeed"
    engine: Literal["single", "ddp", "zero"] = "zero" if is_zero else "single" if num_gpus == 1 else "ddp"
    model = resolve_preset(recipe.model.preset).with_image_size(recipe.model.image_size)
    teacher = None
    if isinstance(recipe, PretrainMimRecipe | DistillRecipe):
        teacher, note = _teacher(recipe.teacher.model)
        notes += [note] if note else []
    if recipe.engine.activation_checkpointing == "selective":
        notes.append("selective checkpointing is counted as none: activations are an upper bound")
    if recipe.engine.offload != "none":
        notes.append(f'engine.offload = "{recipe.engine.offload}" is not counted: memory is an upper bound')
    job = Job(
        name=name,
        stage=recipe.stage,
        model=model,
        teacher=teacher,
        samples_seen=train.samples_seen,
        global_batch_size=train.global_batch_size,
        num_gpus=num_gpus,
        numerics="fp32" if train.precision == "fp32" else "autocast",
        engine=engine,
        zero_stage=3 if is_fsdp2 else recipe.engine.zero_stage,
        accumulation=_accumulation(train.micro_batch_size, train.global_batch_size // num_gpus),
        checkpointing=recipe.engine.activation_checkpointing == "full",
        kept_checkpoints=recipe.checkpoint.keep,
        notes=tuple(notes),
    )
    if isinstance(recipe, PretrainMimRecipe):
        predict = teacher.embed_dim if teacher else model.predict_dim or DEFAULT_PREDICT_DIM
        rows, columns = model.grid
        return replace(
            job, model=mim_config(model, predict), masked=round(recipe.objective.mask_ratio * rows * columns)
        )
    if model.task != "clip":
        raise RecipeError(f"model.preset = {recipe.model.preset!r} is a MIM model: it has no text tower")
    return replace(
        job,
        patch_dropout=recipe.model.patch_dropout,
        distils_logits=isinstance(recipe, DistillRecipe) and recipe.objective.logit_weight > 0,
        notes=(*notes, f"captions are counted at {model.context_length} tokens; trimmed batches need less"),
    )


def _accumulation(micro_batch_size: int | None, samples: int) -> int:
    """Micro-batches of a rank's `samples`."""
    return 1 if micro_batch_size is None else -(-samples // micro_batch_size)


def _teacher(name: str) -> tuple[ModelConfig | None, str | None]:
    """The teacher's configuration, and what to say where it is not known: a folder may not be there yet."""
    path = Path(name)
    found = sorted(path.glob("checkpoints/step_*/model_config.json")) + sorted(path.glob("model_config.json"))
    if found:
        import json

        return ModelConfig.from_json(json.loads(found[-1].read_text(encoding="utf-8"))), None
    try:
        return resolve_preset(path.stem if path.suffix else name), None
    except EvatoolError:
        return None, f"the teacher {name} is not there yet: its memory and its work are not counted"
