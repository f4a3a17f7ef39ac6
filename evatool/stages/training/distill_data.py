"""What a student learns from: its teachers, their stores, and the batches that serve them all."""

# B batch, T teacher's embedding

from __future__ import annotations

import logging
from dataclasses import dataclass

from evatool.core.errors import RecipeError
from evatool.data.feature_store.spec import StoreSpec, Views
from evatool.data.train.loader import TrainLoader
from evatool.model.config import ModelConfig
from evatool.plan.costs import flops_per_sample
from evatool.recipe.schema import DistillRecipe, DistillTeacherSection
from evatool.recipe.schema.distill import EMBEDDINGS
from evatool.stages.training import build as wiring
from evatool.stages.training.teachers import open_clip_teacher, required_store_path, views_of
from evatool.teachers.base import Teacher
from evatool.teachers.clip import LazyTeacher

log = logging.getLogger(__name__)


@dataclass
class DistillData:
    """Teachers as the objective has them, and the training batches."""

    teachers: list[Teacher]
    loader: TrainLoader
    views: Views | None
    live: list[ModelConfig]
    """The configurations of the teachers that run at every step."""

    def flops_per_sample(self, recipe: DistillRecipe, config: ModelConfig) -> int:
        """Operations a sample, the teachers' forward passes among them, as `plan.costs` counts them."""
        return flops_per_sample(recipe, config, teachers=self.live)


def open_distill_data(job: wiring.Job, recipe: DistillRecipe, config: ModelConfig) -> DistillData:
    """Every rank calls it. Raises: RecipeError, DataError where a store is missing its folder or is another's.

    Args:
        config: of the student.
    """
    sections = recipe.all_teachers
    for section in sections.values():
        if section.store is not None:
            required_store_path(section.store, recipe.data)  # on every rank, before one of them reads a teacher
    opened = {name: open_clip_teacher(job, section) for name, section in sections.items()}
    specs = tuple(_spec(name, sections[name], clip) for name, clip in opened.items() if sections[name].store)
    store = next(iter(sections.values())).store
    views = None if store is None else views_of(store, specs)
    loader = wiring.build_job_loader(
        job,
        config,
        context_length=max(config.context_length, *(clip.context_length for clip in opened.values())),
        teacher_size=[clip.image_size for clip in opened.values()],
        views=views,
    )
    teachers = [_teacher(name, sections[name], clip, loader) for name, clip in opened.items()]
    live = [clip.config for name, clip in opened.items() if sections[name].store is None]
    for config in live:
        if config.open_clip is not None:
            log.info("the work of teacher %s is not counted: there is no formula for its architecture", config.name)
    live = [config for config in live if config.open_clip is None]
    return DistillData(teachers, loader, views, live)


def _spec(name: str, section: DistillTeacherSection, clip: LazyTeacher) -> StoreSpec:
    assert section.store is not None
    assert section.store.path is not None
    facts = {"teacher": clip.facts.fingerprint, "teacher.picture": clip.image_size}
    return StoreSpec(name or EMBEDDINGS, section.store.path, (2, clip.embed_dim), facts)


def _teacher(name: str, section: DistillTeacherSection, clip: LazyTeacher, loader: TrainLoader) -> Teacher:
    if clip.facts.config is None:
        raise RecipeError(
            f"{section.model} is no CLIP: it has no text tower to learn from",
            where=f"teachers.{name}.model" if name else "teacher.model",
            fix="name a CLIP; a model of pictures alone can teach pretrain-mim",
        )
    return Teacher(
        clip,
        clip.embed_dim,
        name,
        section.weight,
        scale=None if section.temperature is None else 1 / section.temperature,
        bias=section.bias,
        image_size=clip.image_size,
        store=loader.stores.get(name or EMBEDDINGS),
    )
