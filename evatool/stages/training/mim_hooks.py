"""What a MIM run shows of itself: sheets of pictures, and the loss on held-out ones under a mask that stays."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evatool.core.batch import Batch
from evatool.core.disk import can_wait
from evatool.data.feature_store.spec import StoreSpec, Views
from evatool.data.train.loader import TrainLoader, build_train_loader
from evatool.distributed.collectives import all_reduce_sum
from evatool.distributed.engines.amp import autocast
from evatool.objective.mim import MimObjective, masked_targets, patch_cosine
from evatool.recipe.schema import AugmentSection, ImagesSection, PretrainMimRecipe, ValidationSection
from evatool.stages.training import build as wiring
from evatool.stages.training.mim_data import STORE, MimData
from evatool.stages.training.mim_images import look_at, save_image_page, save_mim_images
from evatool.stages.training.teachers import required_store_path
from evatool.train.control import StepResult, TrainerControl
from evatool.train.hooks.base import Hook

log = logging.getLogger(__name__)


class ImageSheets(Hook):
    """A sheet every so many steps, and a page with all of them; every rank looks, rank 0 writes."""

    def __init__(self, section: ImagesSection, job: wiring.Job, data: MimData, objective: MimObjective) -> None:
        self._section, self._job, self._data, self._objective = section, job, data, objective

    def after_step(self, result: StepResult, trainer: TrainerControl) -> None:
        every = self._section.every_steps
        if every is not None and result.step % every == 0:
            folder = self._job.run_dir.path / "pictures"
            with can_wait("the sheet of pictures"):
                with trainer.engine.summon_full_weights():
                    self.draw(folder / f"step_{result.step:08d}.png")
                if self._job.world.is_main:
                    save_image_page(folder, self._job.options.name)

    def draw(self, path: Path) -> Path:
        """The run's first pictures as they are now; every rank calls it, within whole weights."""
        data = self._data
        with torch.random.fork_rng(devices=[]):  # a loader draws a number, which the run must not miss
            loader = wiring.build_job_loader(
                self._job,
                data.shape,
                mask=data.mask,
                teacher_size=data.teacher.image_size,
                views=data.views,
                num_preview=self._section.num_images,
            )
            batch = next(iter(loader)).to(self._job.world.device)
        look = look_at(self._objective, batch)
        if self._job.world.is_main:
            save_mim_images(path, look)
        return path


class Validation(Hook):
    """`val/loss` every so many steps and at the end: the same on any number of ranks.

    Raises: DataError, at once, where the held-out shards are missing.
    """

    def __init__(
        self, section: ValidationSection, job: wiring.Job, recipe: PretrainMimRecipe, data: MimData, model: MimObjective
    ) -> None:
        self._section, self._job, self._objective = section, job, model
        self._precision = recipe.train.precision
        self._loader = open_validation(section, job, recipe, data)
        self._mask = torch.from_numpy(fixed_mask(data.mask.grid, data.mask.masking))

    def after_step(self, result: StepResult, trainer: TrainerControl) -> None:
        if result.step % self._section.every_steps == 0 or result.step == trainer.config.num_steps:
            loss = self._loss(trainer)
            result.add_metrics({"val/loss": loss})
            log.info("step %d  val/loss %.4f", result.step, loss)

    @torch.no_grad()
    def _loss(self, trainer: TrainerControl) -> float:
        device = self._job.world.device
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        was_training = self._objective.training
        self._objective.eval()
        try:
            with torch.random.fork_rng(devices=[]), trainer.engine.summon_full_weights():
                for batch in self._batches():
                    with autocast(self._precision, device):
                        cosines = self._cosines(batch.to(device))
                    assert batch.valid is not None
                    counts = batch.valid.to(device, torch.float64)
                    sums += torch.stack([(cosines.double() * counts).sum(), counts.sum()])
        finally:
            self._objective.train(was_training)
        total, count = all_reduce_sum(sums).tolist()
        return -float(total) / float(count)

    def _batches(self) -> Iterator[Batch]:
        self._loader.position = 0
        for batch in self._loader:
            batch.mask = self._mask.expand(len(batch.image), -1).contiguous()
            yield batch

    def _cosines(self, batch: Batch) -> Tensor:
        """Mean over its masked patches of each picture (B,)."""
        target = masked_targets(self._objective.teacher, self._loader.stores.get(STORE), batch)
        prediction = self._objective.predict_masked(batch)
        return patch_cosine(prediction, target).view(len(batch.image), -1).mean(dim=1)


def open_validation(
    section: ValidationSection, job: wiring.Job, recipe: PretrainMimRecipe, data: MimData
) -> TrainLoader:
    """This rank's share of the held-out pictures, whole, once each; with a store of their own where there is one."""
    plain = {"train": section.data, "sources": None, "phases": None, "mixing": "samples", "streams": 1}
    whole = AugmentSection(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    loader = build_train_loader(
        recipe.data.model_copy(update=plain | {"sampling": "epochs", "augment": whole}),
        image_size=data.shape.image_size,
        context_length=0,
        global_batch_size=recipe.train.global_batch_size,
        rank=job.world.rank,
        world_size=job.world.world_size,
        seed=0,
        teacher_image_sizes=sorted({data.teacher.image_size} - {data.shape.image_size}),
        with_text=False,
        one_pass=True,
        views=_validation_views(recipe, data),
    )
    if section.max_samples is not None:
        loader.dataset.end = min(loader.num_samples, section.max_samples)
    return loader


def _validation_views(recipe: PretrainMimRecipe, data: MimData) -> Views | None:
    store = recipe.teacher.store
    if store is None:
        return None
    facts = {"teacher": data.teacher.facts.fingerprint, "grid": list(data.shape.grid)}
    path = required_store_path(store, recipe.data) / "validation"
    shape = (data.shape.grid[0] * data.shape.grid[1], data.teacher.facts.width)
    return Views(1, 0, (StoreSpec(STORE, path, shape, facts),))


def fixed_mask(grid: tuple[int, int], masking: str) -> np.ndarray:
    """A mask bool (N,) that is the same for every picture: every other patch, as EVA's validation
    (docs/reference/eva.md#mim-images); for
    random masks, of which a masked autoencoder sees 25 %, all but every other patch of every other row."""
    rows, columns = np.indices(grid)
    mask = (rows % 2 + columns % 2 > 0) if masking == "random" else (rows + columns) % 2 == 1
    return mask.reshape(-1)
