"""The loop of a training stage: hooks around it, the trainer, and what the stage hands back at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import nn

from evatool.checkpoint.layout import MODEL_PREFIX
from evatool.checkpoint.load import Checkpoint, latest_checkpoint, load_checkpoint
from evatool.checkpoint.save import save_run
from evatool.core.param_group import ParamGroup
from evatool.data.train.loader import TrainLoader
from evatool.distributed import peers
from evatool.distributed.collectives import gather_objects
from evatool.distributed.engines.build import Engine
from evatool.model.config import ModelConfig
from evatool.objective.base import Objective
from evatool.optim.schedules import build_schedule, warmup_steps_of
from evatool.recipe.schema import DistillRecipe, TrainClipRecipe
from evatool.recipe.write import flatten, to_table, to_toml
from evatool.runs.result import Result
from evatool.runs.run_dir import RunDir
from evatool.stages.training import build as wiring
from evatool.stages.training.build import Job
from evatool.stages.training.evaluation_hook import Evaluation
from evatool.train.control import TrainerConfig
from evatool.train.hooks.base import Hook
from evatool.train.hooks.checkpoint import Checkpoints
from evatool.train.hooks.ema import WeightAverage
from evatool.train.hooks.guards import NonFiniteGuard, StuckAtStart
from evatool.train.hooks.health import HangWatch, ReplicaCheck, ShardCheck
from evatool.train.hooks.log import ConsoleLog, FolderOwner, MetricsFile, StatusFile, read_metrics
from evatool.train.hooks.loss_curve import LossCurve
from evatool.train.hooks.patch_dropout import PatchDropoutSchedule
from evatool.train.hooks.stragglers import Stragglers
from evatool.train.hooks.trackers import Tracker
from evatool.train.loss_spike import SpikeGate
from evatool.train.state import TrainState
from evatool.train.throughput import Work, peak_flops
from evatool.train.trainer import Trainer


def build_hooks(
    job: Job, config: ModelConfig, *, model: nn.Module | None = None, contrastive_key: str | None = None
) -> list[Hook]:
    """What every training stage does around the loop, in this order: what adds figures before what writes them.

    Args:
        config: of the trained model, for its checkpoints.
        model: the CLIP model, where it is one: evaluated and its patch dropout scheduled as the recipe says.
        contrastive_key: the contrastive loss among the objective's losses, watched for being stuck at ln(batch).
    """
    train, run_dir = job.recipe.train, job.run_dir
    guard = train.guard
    hooks: list[Hook] = [
        HangWatch(job.recipe.engine.hang_timeout_sec, run_dir.logs, partial(_record, run_dir)),
        NonFiniteGuard(guard.budget, guard.window, guard.policy, run_dir.journal),
    ]
    if contrastive_key is not None:
        warmup_steps = warmup_steps_of(
            job.recipe.schedule, num_steps=train.num_steps, global_batch_size=train.global_batch_size
        )
        hooks.append(
            StuckAtStart(global_batch_size=train.global_batch_size, warmup_steps=warmup_steps, loss_key=contrastive_key)
        )
    if model is not None and isinstance(job.recipe, TrainClipRecipe | DistillRecipe):
        hooks += _model_hooks(job, job.recipe, config, model)
    if train.ema_decay is not None:
        hooks.append(WeightAverage(train.ema_decay, job.saved))
    save = partial(
        save_run,
        run_dir.checkpoints,
        check_owner=run_dir.check_owner,
        model_config=config.to_json(),
        resolved_toml=to_toml(job.recipe),
        keep=job.recipe.checkpoint.keep,
        keep_every_steps=job.recipe.checkpoint.keep_every_steps,
    )
    settings = flatten(to_table(job.recipe))
    return [
        *hooks,
        Stragglers(),
        ReplicaCheck(),
        ShardCheck(),
        ConsoleLog(job.options.name),
        FolderOwner(run_dir.check_owner),
        MetricsFile(run_dir.metrics),
        *(
            Tracker(kind, run_dir.path, job.options.name, settings, **train.tracking.model_dump())
            for kind in train.trackers
        ),
        StatusFile(run_dir.refresh_status),
        Checkpoints(save, job.recipe.checkpoint.every_steps),
        LossCurve(
            run_dir.metrics,
            loss_curve_path(run_dir),
            title=job.options.name,
            reference=(math.log(train.global_batch_size), "ln(batch)") if contrastive_key == "loss" else None,
        ),
    ]


def _record(run_dir: RunDir, exit_code: int, message: str) -> None:
    run_dir.fail(exit_code, message, speaks_for_rank_0=peers.is_gone(0))


def _model_hooks(
    job: Job, recipe: TrainClipRecipe | DistillRecipe, config: ModelConfig, model: nn.Module
) -> list[Hook]:
    hooks: list[Hook] = []
    if recipe.model.patch_dropout_schedule:
        modules = wiring.patch_dropouts(model)
        hooks.append(PatchDropoutSchedule(modules, recipe.model.patch_dropout, recipe.model.patch_dropout_schedule))
    if recipe.evaluate is not None:
        hooks.append(Evaluation(recipe.evaluate, model, config, job.world, recipe.train.precision))
    return hooks


def build_trainer(
    job: Job,
    objective: Objective,
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
    config = TrainerConfig(
        num_steps=train.num_steps,
        global_batch_size=train.global_batch_size,
        log_every=train.log_every,
        micro_batch_size=train.micro_batch_size,
        seed=train.seed,
        stop_file=job.run_dir.path / "STOP",
        save_every_sec=None if every_minutes is None else 60 * every_minutes,
    )
    return Trainer(
        config,
        objective=objective,
        engine=engine,
        loader=loader,
        groups=groups,
        schedule=build_schedule(
            job.recipe.schedule, num_steps=train.num_steps, global_batch_size=train.global_batch_size
        ),
        hooks=hooks,
        state=state,
        gate=SpikeGate(train.guard.spike_sigma or None, train.guard.spike_window, state.recent_losses),
        restore=partial(newest_checkpoint, job),
        work=work,
        tower_norms=job.tower_norms,
        draws=job.draws,
    )


def newest_checkpoint(job: Job) -> Checkpoint | None:
    """The newest whole checkpoint of the run, the same one on every rank, which all call it; None if it has none."""
    found = latest_checkpoint(job.run_dir.path) if job.world.is_main else None
    newest = gather_objects(found)[0]
    return None if newest is None else load_checkpoint(newest, is_verified=True)


# -------------------------------------------------------------------------------------------------------- the end


def training_result(
    job: Job, trainer: Trainer, *, next_command: str | None, images: dict[str, Path] | None = None
) -> Result:
    """What a finished training stage hands back: where things are, the last figures, and what to run next."""
    run_dir, state = job.run_dir, trainer.state
    # A run that was resumed at its last step has no metrics of its own.
    last = trainer.metrics or (read_metrics(run_dir.metrics) or [{}])[-1]
    metrics: dict[str, float | int | str] = {
        "steps": state.step,
        "samples_seen": state.samples_seen,
        "samples_per_sec": round(state.samples_seen / state.train_sec, 2) if state.train_sec else 0.0,
        "skipped_steps": len(state.skipped_steps),
        "parameters": _count_parameters(trainer),
    }
    metrics |= {key: value for key, value in last.items() if key.startswith(("train/", "val/")) and value is not None}
    if trainer.objective.chance_loss is not None:
        metrics["stuck_at_start"] = int("stuck_at_start" in state.notes)
    metrics |= {key.replace("data/", ""): int(count) for key, count in trainer.data_counts().items()}
    if state.notes:
        metrics["warning"] = "; ".join(state.notes.values())
    outputs = {
        "checkpoint": run_dir.checkpoints / f"step_{state.step:08d}",
        "metrics": run_dir.metrics,
        "loss_curve": loss_curve_path(run_dir),
    }
    return Result(
        stage=job.recipe.stage,
        run_dir=run_dir.path,
        outputs=outputs | (images or {}),
        metrics=metrics,
        next_command=next_command,
    )


def _count_parameters(trainer: Trainer) -> int:
    """Of the trained model; a rank of ZeRO-3 holds none of some of them, so their own sizes do not tell."""
    shapes = trainer.engine.sharded_model_state().shapes
    names = [name for name, _ in trainer.objective.named_parameters() if name.startswith(MODEL_PREFIX)]
    return sum(math.prod(shapes[name]) for name in names)


def loss_curve_path(run_dir: RunDir) -> Path:
    """Where the picture of the loss is."""
    return run_dir.path / "loss_curve.png"
