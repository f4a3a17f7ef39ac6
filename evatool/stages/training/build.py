"""Build steps that the training stages share, in the order in which a stage takes them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from open_clip import CustomTextCLIP
from open_clip.transformer import PatchDropout as ClipPatchDropout
from timm.layers import PatchDropout, PatchDropoutWithIndices
from torch import nn

from evatool.checkpoint.layout import MODEL_PREFIX, unfinished_in
from evatool.checkpoint.load import Checkpoint, latest_checkpoint, load_checkpoint
from evatool.core.atomic_io import write_text_atomically
from evatool.core.batch_shares import undivided_batch
from evatool.core.errors import RecipeError
from evatool.core.param_group import ParamGroup
from evatool.data.feature_store.spec import Views
from evatool.data.train.drift import read_counts, write_counts
from evatool.data.train.loader import TrainLoader, build_train_loader
from evatool.data.train.masking import MaskSpec
from evatool.distributed.collectives import gather_objects
from evatool.distributed.engines.build import Engine, build_engine, engine_kind, shards_weights
from evatool.distributed.engines.meta_init import InitialWeights, MetaBuild
from evatool.distributed.meeting import meet
from evatool.distributed.versions import check_versions
from evatool.distributed.world import World, joined_world
from evatool.model.clip import build_clip
from evatool.model.keyed_draws import StepDraws
from evatool.model.presets import ModelConfig, resolve_preset
from evatool.model.vision import restore_buffers
from evatool.objective.base import Objective
from evatool.optim.build import build_optimizer
from evatool.optim.locking import lock
from evatool.optim.param_groups import build_param_groups, group_table
from evatool.recipe.schema import (
    ClipModelSection,
    DistillRecipe,
    PretrainMimRecipe,
    TrainClipRecipe,
    TrainingRecipe,
)
from evatool.runs.run_dir import RunDir, RunOptions, open_run_dir
from evatool.stages.training.initial_weights import init_clip
from evatool.train.state import TrainState, resume_from
from evatool.train.tower_norms import TowerNorms
from evatool.weights.load import Sources

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
    tower_norms: TowerNorms | None = None
    draws: StepDraws | None = None
    """What the model draws by sample in each step."""
    """Set with the engine."""
    meta_build: MetaBuild | None = None
    """Set where the objective was built without its weights."""
    sources: Sources | None = None
    """Then: what reads those that `[model.init]` names."""


# ------------------------------------------------------------------------------------------------------ the start


@contextmanager
def open_job(recipe: AnyTraining, options: RunOptions) -> Iterator[Job]:
    """Join the job's ranks, check what depends on their number, open the run folder, seed; every rank calls it.

    Raises: RecipeError, UsageError, CheckpointError, all before any data or model is touched.
    """
    with joined_world() as world:
        check_world_size(recipe, world.world_size)
        check_versions()
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


_OPENING = "to open the run folder"


def _open_folder(recipe: AnyTraining, options: RunOptions, world: World) -> tuple[RunDir, Path | None]:
    """The run folder and the checkpoint to go on from: rank 0 opens and decides, the others follow."""
    if world.is_main:
        run_dir = open_run_dir(recipe, options)
        newest = latest_checkpoint(run_dir.path) if run_dir.resumed else None
        for unfinished in unfinished_in(run_dir.checkpoints):  # of a start that was killed while it saved
            shutil.rmtree(unfinished, ignore_errors=True)
        meet(_OPENING)
        gather_objects(newest)
        return run_dir, newest
    meet(_OPENING)
    newest = gather_objects(None)[0]
    return open_run_dir(recipe, options, world.rank), newest


def check_world_size(recipe: TrainingRecipe, world_size: int) -> None:
    """Raises: RecipeError, with all problems, where this many ranks cannot carry out the recipe."""
    problems = []
    batch = recipe.train.global_batch_size
    undivided = undivided_batch(batch, world_size)
    if undivided is not None:
        problems.append("; ".join(undivided))
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
    teacher_size: int | Sequence[int] = (),
    views: Views | None = None,
    num_preview: int | None = None,
) -> TrainLoader:
    """This rank's batches from the start of the run; `start_state` moves it on.

    Args:
        config: of the model that learns.
        context_length: tokens of a caption; no text when 0.
        mask: block masks for the model that learns.
        teacher_size: input side of each teacher, which gets its own view of each picture where it differs.
        views: of each sample, where a teacher's features are stored.
        num_preview: instead, on every rank and in this process, the first this many samples of the run.
    """
    section, batch_size = job.recipe.data, job.recipe.train.global_batch_size
    rank, world_size = job.world.rank, job.world.world_size
    teacher_sizes = [teacher_size] if isinstance(teacher_size, int) else teacher_size
    if num_preview is not None:
        section, batch_size, rank, world_size = section.model_copy(update={"num_workers": 0}), num_preview, 0, 1
    return build_train_loader(
        section,
        image_size=config.image_size,
        context_length=context_length,
        global_batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        seed=job.recipe.train.seed,
        mask=mask,
        teacher_image_sizes=sorted(set(teacher_sizes) - {config.image_size}),
        with_text=context_length > 0,
        views=views,
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
    wanted = config.input
    return replace(
        config,
        input=replace(wanted, mean=section.image_mean or wanted.mean, std=section.image_std or wanted.std),
    )


@contextmanager
def initial_weights(job: Job) -> Iterator[None]:
    """Stands around the building of an objective, whose random numbers follow from the recipe's seed.

    Where the engine divides weights over ranks the objective is built on the meta device, and the engine is given its
    weights one tensor at a time, the same numbers: no rank ever holds all of them.
    """
    if not shards_weights(job.recipe.engine, job.world.world_size):
        yield
        return
    job.meta_build, job.sources = MetaBuild(), {}
    with torch.device("meta"), job.meta_build:
        yield


def build_clip_model(
    config: ModelConfig, section: ClipModelSection, *, is_resumed: bool, sources: Sources | None = None
) -> CustomTextCLIP:
    """The CLIP model with its first weights: random, or as `[model.init]` says.

    Args:
        is_resumed: leave `[model.init]` out: the checkpoint replaces all weights, and the source may be gone by now.
        sources: where it is given, what `[model.init]` names is not read but noted there.
    Raises: CheckpointError where the source's weights do not fit.
    """
    # timm makes no module for a share of 0, which a schedule could not raise.
    shares = [section.patch_dropout, *(share for _, share in section.patch_dropout_schedule)]
    config = config.with_logit_bias(False)  # the sigmoid loss has a bias of its own
    clip = build_clip(config, patch_dropout=max(shares), drop_path_rate=section.drop_path_rate)
    if not is_resumed:
        with torch.device("cpu"):  # also where the model is built on the meta device
            init_clip(clip, config, section, sources)
    depths = {"visual": config.depth, "text": config.text_depth}
    for tower, layers in (("visual", section.lock.visual), ("text", section.lock.text)):
        if layers is not None:
            named = [(f"model.{name}", param) for name, param in clip.named_parameters()]
            frozen = lock(named, tower, layers, depths[tower])  # type: ignore[arg-type]
            log.info("%s tower: %d tensors are frozen, its projection learns", tower, len(frozen))
    return clip


def patch_dropouts(model: nn.Module) -> list[nn.Module]:
    """The modules that drop patches, timm's and open_clip's."""
    return [m for m in model.modules() if isinstance(m, PatchDropout | PatchDropoutWithIndices | ClipPatchDropout)]


# --------------------------------------------------------------------------------------------------- optim, engine


def build_groups(recipe: TrainingRecipe, objective: Objective, config: ModelConfig) -> list[ParamGroup]:
    """The optimiser's groups; their table goes to the log. Raises: RecipeError where `[optim]` does not fit."""
    groups = build_param_groups(
        objective.named_parameters(),
        recipe.optim,
        depth_visual=config.depth,
        depth_text=config.text_depth,
        owners=objective.parameter_owners(),
    )
    counts: dict[str, int] = {}
    for group in groups:
        counts[group.tower] = counts.get(group.tower, 0) + sum(p.numel() for p in group.params)
    log.info("parameters: %s", ", ".join(f"{tower} {count:,}" for tower, count in counts.items()))
    for row in group_table(groups):
        log.info("  %s", "  ".join(row))
    return groups


def build_job_engine(job: Job, objective: Objective, groups: Sequence[ParamGroup]) -> Engine:
    """The recipe's engine around the objective, on this rank's device; the table of groups goes to the run folder.

    An objective that was built without its weights gets its first ones here, unless a checkpoint's follow.
    """
    optim = job.recipe.optim
    if job.world.is_main:
        rows = ["\t".join(row) for row in group_table(groups)]
        write_text_atomically(job.run_dir.path / "parameter_groups.tsv", "\n".join([*rows, ""]))
    job.draws = StepDraws(objective)
    optimizer = build_optimizer(optim, groups)
    job.tower_norms = TowerNorms(optimizer, groups)
    first = None
    if job.meta_build is not None:
        restore_buffers(objective)
        named = {f"{MODEL_PREFIX}{name}": read for name, read in (job.sources or {}).items()}
        first = InitialWeights(objective, job.meta_build, named)
    engine = build_engine(
        job.recipe.engine,
        job.world,
        objective,
        groups,
        precision=job.recipe.train.precision,
        grad_clip_norm=optim.grad_clip_norm,
        optimizer=optimizer,
        bounds=objective.parameter_bounds,
    )
    if first is not None and job.saved is None:
        engine.load_model_state(first)
    return engine


def start_state(job: Job, engine: Engine, groups: Sequence[ParamGroup], loader: TrainLoader) -> TrainState:
    """Where the run stands: at its beginning, or at the checkpoint, whose weights, moments and position are put back.

    Raises: CheckpointError where the checkpoint is of another model; RecipeError where the data are others.
    """
    log.info("data: %d samples", loader.num_samples)
    if job.saved is None:
        _keep_counts(job, loader)
        return TrainState(seed=job.recipe.train.seed, data_order=loader.order_name, draws_keyed_by="sample")
    # Rank 0 reads for all: it may write the file anew before another rank has looked.
    before = gather_objects(read_counts(job.run_dir.path) if job.world.is_main else None)[0]
    saved_order = str(job.saved.train_state.get("data_order", ""))
    loader.check_order(saved_order, str(job.saved.path), before=before, accepted=job.options.accept_drift)
    if before is None or saved_order != loader.order_name:
        _keep_counts(job, loader)
    state = resume_from(job.saved, engine, groups)
    state.data_order = loader.order_name
    loader.position = state.position
    if job.world.is_main:  # figures are summed over ranks
        loader.bad.before = state.data_counts
    log.info("resumed from %s: step %d, %d samples seen", job.saved.path, state.step, state.samples_seen)
    return state


def _keep_counts(job: Job, loader: TrainLoader) -> None:
    """Write down how many samples the shards have that this run reads; rank 0 does."""
    if job.world.is_main:
        write_counts(job.run_dir.path, loader.sample_counts)
