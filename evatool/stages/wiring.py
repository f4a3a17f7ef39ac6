"""Build steps that the training stages share, in the order in which a stage takes them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from open_clip import CustomTextCLIP
from torch import nn

from evatool.api import LoadedClip, load_clip, read_weights
from evatool.checkpoint.layout import MODEL_PREFIX
from evatool.checkpoint.load import Checkpoint, latest_checkpoint, load_checkpoint
from evatool.checkpoint.save import save_run
from evatool.data.loader import TrainLoader, build_train_loader
from evatool.data.masking import MaskSpec
from evatool.distributed.collectives import gather_objects
from evatool.distributed.engine import Engine, build_engine, engine_kind
from evatool.distributed.world import World, close_world, init_world
from evatool.errors import RecipeError
from evatool.model.clip import build_clip
from evatool.model.presets import ModelConfig, resolve_preset
from evatool.model.weights import init_image_tower, init_text_tower, load_clip_weights
from evatool.optim.build import build_optimizer
from evatool.optim.param_groups import build_param_groups, group_table
from evatool.optim.schedules import build_schedule, warmup_steps_of
from evatool.recipe.schema import (
    ClipModelSection,
    DistillRecipe,
    ImageTowerInit,
    ImageTowerSource,
    PretrainMimRecipe,
    TeacherSection,
    TextTowerSource,
    TowersInit,
    TrainClipRecipe,
    TrainingRecipe,
    WholeModelInit,
)
from evatool.recipe.write import to_toml
from evatool.stages.run_dir import RunDir, RunOptions, open_run_dir
from evatool.train.gate import SpikeGate
from evatool.train.guards import NonFiniteGuard, StuckAtStart
from evatool.train.hooks import Checkpoints, ConsoleLog, Hook, MetricsFile, StatusFile, read_metrics
from evatool.train.loss_curve import LossCurve
from evatool.train.state import TrainState, resume_from
from evatool.train.throughput import Work, peak_flops
from evatool.train.trainer import Trainer
from evatool.types import ParamGroup, Result

log = logging.getLogger(__name__)


AnyTraining = PretrainMimRecipe | TrainClipRecipe | DistillRecipe


@dataclass
class Job:
    """One rank's part in a training run: who it is, where it writes, what it goes on from."""

    recipe: AnyTraining
    options: RunOptions
    world: World
    run_dir: RunDir
    saved: Checkpoint | None
    """The newest whole checkpoint of a resumed run."""


# ------------------------------------------------------------------------------------------------------ the start


@contextmanager
def open_job(recipe: AnyTraining, options: RunOptions) -> Iterator[Job]:
    """Join the job's ranks, check what depends on their number, open the run folder, seed; every rank calls it.

    Raises: RecipeError, UsageError, CheckpointError, all before any data or model is touched.
    """
    world = init_world()
    try:
        check_world_size(recipe, world.world_size)
        run_dir, newest = _open_folder(recipe, options, world)
        saved = None if newest is None else load_checkpoint(newest, is_verified=True)
        torch.manual_seed(recipe.train.seed)  # first weights; the same on every rank
        log.info(
            "%s: %d steps of %d samples on %d x %s, %s",
            recipe.stage,
            recipe.train.num_steps,
            recipe.train.global_batch_size,
            world.world_size,
            world.device.type,
            recipe.train.precision,
        )
        yield Job(recipe, options, world, run_dir, saved)
    finally:
        close_world()


def _open_folder(recipe: AnyTraining, options: RunOptions, world: World) -> tuple[RunDir, Path | None]:
    """The run folder and the checkpoint to go on from: rank 0 opens and decides, the others follow."""
    if world.is_main:
        run_dir = open_run_dir(recipe, options)
        newest = latest_checkpoint(run_dir.path) if run_dir.resumed else None
        gather_objects(newest)
        return run_dir, newest
    newest = gather_objects(None)[0]
    return open_run_dir(recipe, options, world.rank), newest


def check_world_size(recipe: TrainingRecipe, world_size: int) -> None:
    """Raises: RecipeError, with all problems, where this many ranks cannot carry out the recipe."""
    problems = []
    batch = recipe.train.global_batch_size
    if batch % world_size:
        near = [n for n in (batch // world_size * world_size, -(-batch // world_size) * world_size) if n]
        problems.append(
            f"train.global_batch_size = {batch} does not divide over {world_size} ranks; nearest that do: "
            + ", ".join(str(n) for n in near)
        )
    micro = recipe.train.micro_batch_size
    if micro is not None and batch % world_size == 0 and (batch // world_size) % micro:
        local = batch // world_size
        fitting = [n for n in range(1, local + 1) if local % n == 0]
        near = [max(n for n in fitting if n < micro), *[n for n in fitting if n > micro][:1]] if micro > 1 else [1]
        problems.append(
            f"train.micro_batch_size = {micro} does not divide a rank's share of the batch, {batch} / {world_size} = "
            f"{local}; nearest that do: {', '.join(str(n) for n in near)}"
        )
    try:
        engine_kind(recipe.engine, world_size)
    except RecipeError as error:
        problems.append(f"{error.what}; {error.fix}")
    if problems:
        raise RecipeError(f"the recipe does not fit a job of {world_size} processes", problems=problems)


# ----------------------------------------------------------------------------------------------------------- data


def build_job_loader(
    job: Job,
    config: ModelConfig,
    *,
    context_length: int = 0,
    mask: MaskSpec | None = None,
    teacher: LoadedClip | None = None,
    num_preview: int | None = None,
) -> TrainLoader:
    """This rank's batches from the start of the run; `start_state` moves it on.

    Args:
        config: of the model that learns.
        context_length: tokens of a caption; no text when 0.
        mask: block masks for the model that learns.
        teacher: gets its own view of each picture where its input size differs.
        num_preview: instead, on every rank and in this process, the first this many samples of the run.
    """
    section, batch_size = job.recipe.data, job.recipe.train.global_batch_size
    rank, world_size = job.world.rank, job.world.world_size
    if num_preview is not None:
        section, batch_size, rank, world_size = section.model_copy(update={"num_workers": 0}), num_preview, 0, 1
    sizes_differ = teacher is not None and teacher.image_size != config.image_size
    return build_train_loader(
        section,
        image_size=config.image_size,
        context_length=context_length,
        global_batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        seed=job.recipe.train.seed,
        mask=mask,
        teacher_image_size=teacher.image_size if teacher is not None and sizes_differ else None,
        with_text=context_length > 0,
    )


# ---------------------------------------------------------------------------------------------------------- model


def clip_config(section: ClipModelSection) -> ModelConfig:
    """The configuration of the CLIP model to train. Raises: RecipeError where the preset is no CLIP model."""
    config = resolve_preset(section.preset).with_image_size(section.image_size)
    if config.task != "clip":
        raise RecipeError(
            f"model.preset = {section.preset!r} is a MIM model: it has no text tower",
            where="model.preset",
            fix="name a CLIP preset (docs/models.md); to start from MIM weights use [model.init]",
        )
    return config


def build_clip_model(config: ModelConfig, section: ClipModelSection, *, is_resumed: bool) -> CustomTextCLIP:
    """The CLIP model with its first weights: random, or as `[model.init]` says.

    Args:
        is_resumed: leave `[model.init]` out: the checkpoint replaces all weights, and the source may be gone by now.
    Raises: CheckpointError where the source's weights do not fit.
    """
    clip = build_clip(config, patch_dropout=section.patch_dropout, drop_path_rate=section.drop_path_rate)
    if is_resumed:
        return clip
    match section.init:
        case ImageTowerInit(path=path):
            report = init_image_tower(clip, read_weights(path).state, where=str(path))
            log.info("image tower from %s: %s", path, report)
        case TowersInit(image=image, text=text):
            init_towers(clip, image, text)
        case WholeModelInit(path=path):
            report = load_clip_weights(clip, read_weights(path).state, where=str(path))
            log.info("all weights from %s: %s", path, report)
    return clip


def init_towers(clip: CustomTextCLIP, image: ImageTowerSource | None, text: TextTowerSource | None) -> None:
    """Each tower's first weights from its own source. Raises: CheckpointError where one does not fit."""
    if image is not None:
        state = read_weights(image.path).state
        report = init_image_tower(
            clip, state, where=str(image.path), may_be_fresh=image.fresh, patch_resize=image.patch_resize
        )
        log.info("image tower from %s: %s", image.path, report)
    if text is not None:
        state = read_weights(text.path).state
        report = init_text_tower(clip, state, where=str(text.path), may_be_fresh=text.fresh)
        log.info("text tower from %s: %s", text.path, report)


def load_teacher(job: Job, section: TeacherSection) -> LoadedClip:
    """The frozen teacher on this rank's device. Raises: CheckpointError, UsageError as `load_clip`."""
    teacher = load_clip(section.model, device=job.world.device)
    log.info("teacher: %s, %s", teacher.config.name, teacher.source)
    return teacher


# --------------------------------------------------------------------------------------------------- optim, engine


def build_groups(recipe: TrainingRecipe, objective: nn.Module, config: ModelConfig) -> list[ParamGroup]:
    """The optimiser's groups; their table goes to the log. Raises: RecipeError where `[optim]` does not fit."""
    groups = build_param_groups(
        objective.named_parameters(), recipe.optim, depth_visual=config.depth, depth_text=config.text_depth
    )
    counts: dict[str, int] = {}
    for group in groups:
        counts[group.tower] = counts.get(group.tower, 0) + sum(p.numel() for p in group.params)
    log.info("parameters: %s", ", ".join(f"{tower} {count:,}" for tower, count in counts.items()))
    for row in group_table(groups):
        log.debug("  ".join(row))
    return groups


def build_job_engine(job: Job, objective: nn.Module, groups: Sequence[ParamGroup]) -> Engine:
    """The recipe's engine around the objective, on this rank's device."""
    optim = job.recipe.optim
    return build_engine(
        job.recipe.engine,
        job.world,
        objective,
        groups,
        precision=job.recipe.train.precision,
        grad_clip_norm=optim.grad_clip_norm,
        optimizer=build_optimizer(optim, groups),
    )


def start_state(job: Job, engine: Engine, groups: Sequence[ParamGroup], loader: TrainLoader) -> TrainState:
    """Where the run stands: at its beginning, or at the checkpoint, whose weights, moments and position are put back.

    Raises: CheckpointError where the checkpoint is of another model.
    """
    log.info("data: %d samples", loader.num_samples)
    if job.saved is None:
        return TrainState(seed=job.recipe.train.seed, data_order=loader.order_name)
    loader.check_order(str(job.saved.train_state.get("data_order", "")), str(job.saved.path))
    state = resume_from(job.saved, engine, groups)
    loader.position = state.position
    log.info("resumed from %s: step %d, %d samples seen", job.saved.path, state.step, state.samples_seen)
    return state


# -------------------------------------------------------------------------------------------------- hooks, trainer


def build_hooks(job: Job, config: ModelConfig, *, contrastive_key: str | None = None) -> list[Hook]:
    """What every training stage does around the loop, in this order.

    Args:
        config: of the trained model, for its checkpoints.
        contrastive_key: the contrastive loss among the objective's losses, watched for being stuck at ln(batch).
    """
    train, run_dir = job.recipe.train, job.run_dir
    guard = train.guard
    hooks: list[Hook] = [NonFiniteGuard(guard.budget, guard.window, guard.policy, run_dir.journal)]
    if contrastive_key is not None:
        warmup_steps = warmup_steps_of(
            job.recipe.schedule, num_steps=train.num_steps, global_batch_size=train.global_batch_size
        )
        hooks.append(
            StuckAtStart(global_batch_size=train.global_batch_size, warmup_steps=warmup_steps, loss_key=contrastive_key)
        )
    save = partial(
        save_run,
        run_dir.checkpoints,
        model_config=config.to_json(),
        resolved_toml=to_toml(job.recipe),
        keep=job.recipe.checkpoint.keep,
        keep_every_steps=job.recipe.checkpoint.keep_every_steps,
    )
    return [
        *hooks,
        ConsoleLog(job.options.name),
        MetricsFile(run_dir.metrics),
        StatusFile(run_dir.refresh_status),
        Checkpoints(save, job.recipe.checkpoint.every_steps),
        LossCurve(
            run_dir.metrics,
            loss_curve_path(run_dir),
            title=job.options.name,
            reference=(math.log(train.global_batch_size), "ln(batch)") if contrastive_key == "loss" else None,
        ),
    ]


def build_trainer(
    job: Job,
    objective: nn.Module,
    engine: Engine,
    loader: TrainLoader,
    groups: Sequence[ParamGroup],
    hooks: Sequence[Hook],
    state: TrainState,
    flops_per_sample: float | None = None,
) -> Trainer:
    """The loop with the recipe's length, schedule, batch and policies.

    Args:
        flops_per_sample: model FLOPs of a sample's forward and backward pass; no MFU when None.
    """
    train = job.recipe.train
    every_minutes = job.recipe.checkpoint.every_minutes
    peak = None if flops_per_sample is None else peak_flops(job.world.device, train.precision)
    work = None if flops_per_sample is None or peak is None else Work(flops_per_sample, peak * job.world.world_size)
    return Trainer(
        objective,
        engine,
        loader,
        groups,
        build_schedule(job.recipe.schedule, num_steps=train.num_steps, global_batch_size=train.global_batch_size),
        hooks,
        state,
        train.num_steps,
        train.global_batch_size,
        log_every=train.log_every,
        micro_batch_size=train.micro_batch_size,
        gate=SpikeGate(train.guard.spike_sigma, train.guard.spike_window, state.recent_losses),
        restore=partial(newest_checkpoint, job),
        stop_file=job.run_dir.path / "STOP",
        save_every_sec=None if every_minutes is None else 60 * every_minutes,
        work=work,
    )


def newest_checkpoint(job: Job) -> Checkpoint | None:
    """The newest whole checkpoint of the run, the same one on every rank, which all call it; None if it has none."""
    found = latest_checkpoint(job.run_dir.path) if job.world.is_main else None
    newest = gather_objects(found)[0]
    return None if newest is None else load_checkpoint(newest, is_verified=True)


# -------------------------------------------------------------------------------------------------------- the end


def training_result(
    job: Job, trainer: Trainer, *, next_command: str, pictures: dict[str, Path] | None = None
) -> Result:
    """What a finished training stage hands back: where things are, the last figures, and what to run next."""
    run_dir, state, train = job.run_dir, trainer.state, job.recipe.train
    # A run that was resumed at its last step has no figures of its own.
    record = trainer.record or (read_metrics(run_dir.metrics) or [{}])[-1]
    metrics: dict[str, float | int | str] = {
        "steps": state.step,
        "samples_seen": state.samples_seen,
        "samples_per_sec": round(state.samples_seen / state.train_sec, 2) if state.train_sec else 0.0,
        "skipped_steps": len(state.skipped_steps),
        "parameters": sum(
            p.numel() for name, p in trainer.objective.named_parameters() if name.startswith(MODEL_PREFIX)
        ),
    }
    metrics |= {key: value for key, value in record.items() if key.startswith("train/") and value is not None}
    if isinstance(job.recipe, TrainClipRecipe | DistillRecipe) and job.recipe.objective.kind != "sigmoid":
        metrics["stuck_at_start"] = int("stuck_at_start" in state.notes)
    metrics |= {key.replace("data/", ""): int(count) for key, count in trainer.data_figures().items()}
    if state.notes:
        metrics["warning"] = "; ".join(state.notes.values())
    outputs = {
        "checkpoint": run_dir.checkpoints / f"step_{train.num_steps:08d}",
        "metrics": run_dir.metrics,
        "loss_curve": loss_curve_path(run_dir),
    }
    return Result(
        stage=job.recipe.stage,
        run_dir=run_dir.path,
        outputs=outputs | (pictures or {}),
        metrics=metrics,
        next_command=next_command,
    )


def loss_curve_path(run_dir: RunDir) -> Path:
    """Where the picture of the loss is."""
    return run_dir.path / "loss_curve.png"
