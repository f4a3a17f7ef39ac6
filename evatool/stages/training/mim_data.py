"""What a student of masked image modelling learns from: its teacher, masks, batches, and what is stored of them."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from evatool.core.errors import RecipeError
from evatool.data.feature_store.spec import StoreSpec, Views
from evatool.data.train.loader import TrainLoader
from evatool.data.train.masking import MaskSpec
from evatool.model.presets import ModelConfig, resolve_preset
from evatool.objective.build import PatchTargets
from evatool.plan.costs import TeacherModel, flops_per_sample
from evatool.plan.traced import TracedModel
from evatool.recipe import schema
from evatool.recipe.schema import PretrainMimRecipe, TrainClipRecipe
from evatool.recipe.schema.teacher import TIMM_PREFIX
from evatool.stages.training import build as wiring
from evatool.stages.training.teachers import (
    open_patch_teacher,
    required_store_path,
    views_of,
)
from evatool.teachers.clip import GridTeacher, LazyTeacher
from evatool.teachers.trace import trace_timm_teacher

log = logging.getLogger(__name__)

STORE = "patches"
"""Name of the store of a teacher's patch features."""


@dataclass
class MimData:
    """What the student learns from."""

    shape: ModelConfig
    """Of the student."""
    mask: MaskSpec
    teacher: LazyTeacher
    patches: GridTeacher
    """The teacher on the student's grid."""
    views: Views | None
    loader: TrainLoader

    @property
    def patch_targets(self) -> PatchTargets:
        """What the objective needs of all this."""
        return PatchTargets(
            teacher=self.patches,
            predict_dim=self.teacher.facts.width,
            num_masked=self.mask.generator().num_masked,
            width=self.shape.width,
            store=self.loader.stores.get(STORE),
        )

    def flops_per_sample(self, recipe: PretrainMimRecipe | TrainClipRecipe, config: ModelConfig) -> int:
        """Operations a sample with this run's masks and its teacher, as `plan.costs` counts them.

        Args:
            config: of the model that learns.
        """
        assert recipe.teacher is not None, "a student of masked image modelling has a teacher"
        return flops_per_sample(
            recipe,
            config,
            teachers=[] if self.views is not None else running_teacher(self.teacher, recipe.teacher),
            masked=self.mask.generator().num_masked,
            predict_dim=self.teacher.facts.width,
        )


def running_teacher(teacher: LazyTeacher, section: schema.PatchTeacherSection) -> list[TeacherModel]:
    """The teacher's architecture for counting; nothing, with a warning, where torch cannot count a timm model."""
    if teacher.facts.config is not None:
        return [teacher.config]
    name = section.model.removeprefix(TIMM_PREFIX)
    try:
        return [TracedModel(**trace_timm_teacher(name, section.layer, section.image_size))]
    except RecipeError as error:
        log.warning("the share of the peak (MFU) leaves the teacher out: %s", error.what)
        return []


def open_mim_data(job: wiring.Job, recipe: PretrainMimRecipe) -> MimData:
    """Teacher, masks and batches. Raises: RecipeError where the student predicts features of another width."""
    shape = resolve_preset(recipe.model.preset).with_image_size(recipe.model.image_size)
    check_decoder(shape, recipe)
    return open_masked_data(job, shape, recipe.objective, recipe.teacher)


def open_masked_data(
    job: wiring.Job,
    shape: ModelConfig,
    masks: schema.MimObjective | schema.JointMim,
    section: schema.PatchTeacherSection,
    *,
    context_length: int = 0,
) -> MimData:
    """The same for a student of this shape, with captions where they are asked for."""
    masking = masks.masking if isinstance(masks, schema.MimObjective) else "blocks"
    mask = MaskSpec(shape.grid, masks.mask_ratio, masks.min_block_fraction, masking)
    generator = mask.generator()  # here, so that masks that cannot be drawn are said before anything is loaded
    teacher = open_patch_teacher(job, section)
    check_widths(shape, teacher)
    views, store = None, section.store
    if store is not None:
        patches = generator.num_masked if store.masked_only else shape.grid[0] * shape.grid[1]
        spec = StoreSpec(
            STORE,
            required_store_path(store, job.recipe.data),
            (patches, teacher.facts.width),
            {"teacher": teacher.facts.fingerprint, "grid": list(shape.grid)},
            masked_only=store.masked_only,
        )
        views = views_of(store, (spec,))
    loader = wiring.build_job_loader(
        job, shape, context_length=context_length, mask=mask, teacher_size=teacher.image_size, views=views
    )
    return MimData(shape, mask, teacher, GridTeacher(teacher, shape.grid), views, loader)


def check_decoder(student: ModelConfig, recipe: PretrainMimRecipe) -> None:
    """Raises: RecipeError, with all problems, for settings that a masked autoencoder cannot follow."""
    if student.decoder is None:
        return
    problems = []
    if recipe.objective.masking != "random":
        problems.append('objective.masking must be "random": blocks hide different numbers of patches')
    if recipe.model.patch_embed_grad_scale != 1.0:
        problems.append("model.patch_embed_grad_scale must be 1.0: it has no mask token among its patches")
    if problems:
        raise RecipeError(f"{student.name} is a masked autoencoder", problems=problems, where="model.preset")


def check_widths(student: ModelConfig, teacher: LazyTeacher) -> None:
    """Raises: RecipeError where the student's preset says how wide the features are, and the teacher's are not."""
    if student.predict_dim is None or student.predict_dim == teacher.facts.width:
        return
    raise RecipeError(
        f"{student.name} predicts {student.predict_dim} features a patch, the teacher {teacher.facts.name} gives "
        f"{teacher.facts.width}",
        where="model.preset and teacher.model",
        expected=f"a teacher with {student.predict_dim} features",
        fix="choose such a teacher, or a CLIP preset as the student: its image tower predicts any width",
    )
