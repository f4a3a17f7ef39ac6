"""`evatool store-features`: what the teachers of a recipe say of every view of every sample, ahead of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from evatool.core.batch import Batch
from evatool.core.errors import UsageError
from evatool.core.progress import progress
from evatool.data.feature_store.fill import missing_batches, num_rows
from evatool.data.feature_store.store import FeatureStore
from evatool.data.train.loader import TrainLoader
from evatool.distributed.collectives import gather_objects
from evatool.distributed.meeting import meet
from evatool.recipe.schema import DistillRecipe, PretrainMimRecipe, TrainClipRecipe
from evatool.runs.result import Result
from evatool.runs.run_dir import RunOptions
from evatool.stages.training import build as wiring
from evatool.stages.training.clip_data import open_clip_data
from evatool.stages.training.distill_data import open_distill_data
from evatool.stages.training.mim_data import STORE, open_mim_data
from evatool.stages.training.mim_hooks import open_validation
from evatool.teachers.base import Teacher, teacher_features

COMMAND = "store-features"


@dataclass
class StoreWork:
    """A training run's loader with stores, and for each store the teacher's part."""

    loader: TrainLoader
    features: dict[str, Callable[[Batch], Tensor]]
    """Store -> what fills it: a batch on the device, of the teachers' pictures, to (B, ...) features."""
    sizes: Sequence[int] | None = None
    """Sides of the teachers' pictures; the last of the loader's views when None."""


def run(recipe: PretrainMimRecipe | DistillRecipe | TrainClipRecipe, run: RunOptions) -> Result:
    """Fill the stores of `recipe`; every rank calls it and takes its share. What is stored already is left alone.

    Raises: UsageError where the recipe stores no features.
    """
    with wiring.open_job(recipe, run) as job:
        works = _works(job, recipe)
        started, made = time.perf_counter(), 0
        total = sum(num_rows(work.loader) for work in works)
        with progress(COMMAND, total, unit="samples") as bar, torch.no_grad():
            for work in works:
                for batch in missing_batches(work.loader, work.sizes):
                    bar.advance(recipe.train.global_batch_size)
                    if len(batch.keys):
                        made += _fill(work, batch.to(job.world.device))
        meet("to fill its share of the stores")
        made, seconds = sum(gather_objects(made)), time.perf_counter() - started
        training = works[0].loader
        metrics: dict[str, float | int | str] = {
            "samples": training.num_samples,
            "views": training.dataset.num_views or 1,
            "rows_made": made,
            "store_bytes": sum(_bytes(work.loader) for work in works),
            "samples_per_sec": round(made / seconds, 2),
        }
        outputs = {f"store {store.spec.name}".strip(): store.spec.path for store in training.stores.values()}
        name = run.name.removesuffix(f"-{COMMAND}")
        following = f"evatool {recipe.stage} {name}"
        return Result(COMMAND, job.run_dir.path, outputs=outputs, metrics=metrics, next_command=following)


def _bytes(loader: TrainLoader) -> int:
    return sum(store.spec.row_bytes for store in loader.stores.values()) * num_rows(loader)


def _fill(work: StoreWork, batch: Batch) -> int:
    """Rows written."""
    for name, store in work.loader.stores.items():
        if store.rows(batch) is None:
            store.keep(batch, work.features[name](batch))
    return len(batch.keys)


def _works(job: wiring.Job, recipe: PretrainMimRecipe | DistillRecipe | TrainClipRecipe) -> list[StoreWork]:
    """The stores to fill: those of the training pictures first, then those of others."""
    match recipe:
        case PretrainMimRecipe() if recipe.teacher.store is not None:
            data = open_mim_data(job, recipe)
            loaders = [data.loader]
            if recipe.validation is not None:
                loaders.append(open_validation(recipe.validation, job, recipe, data))
            return [StoreWork(each, {STORE: lambda batch: data.patches.visual_tokens(batch.image)}) for each in loaders]
        case TrainClipRecipe() if recipe.teacher is not None and recipe.teacher.store is not None:
            joint = open_clip_data(job, recipe, wiring.clip_config(recipe.model)).mim
            assert joint is not None, "the schema lets no teacher through without a joint objective"
            return [StoreWork(joint.loader, {STORE: lambda batch: joint.patches.visual_tokens(batch.image)})]
        case DistillRecipe() if any(section.store for section in recipe.all_teachers.values()):
            return [_distill_work(job, recipe)]
        case _:
            raise UsageError(
                f"this {recipe.stage} recipe stores no teacher's features",
                expected="a recipe with a teacher and a table [teacher.store]",
                fix="add it to the recipe, or --set teacher.store.views=1",
            )


def _distill_work(job: wiring.Job, recipe: DistillRecipe) -> StoreWork:
    """All stores of a distillation, which one loader serves."""
    data = open_distill_data(job, recipe, wiring.clip_config(recipe.model))
    features: dict[str, Callable[[Batch], Tensor]] = {
        t.store.spec.name: partial(_embeddings, t) for t in data.teachers if isinstance(t.store, FeatureStore)
    }
    sizes = sorted({teacher.image_size for teacher in data.teachers if teacher.image_size is not None})
    return StoreWork(data.loader, features, sizes)


def _embeddings(teacher: Teacher, batch: Batch) -> Tensor:
    """The rows of a batch, (B, 2, T): image and text embeddings of unit length."""
    return torch.stack(teacher_features(teacher, batch), dim=1)
