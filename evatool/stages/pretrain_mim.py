"""`evatool pretrain-mim`: an image tower learns a frozen model's patch features at places it does not see."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from evatool.data.feature_store import StoreSpec, Views
from evatool.data.loader import TrainLoader
from evatool.data.masking import MaskSpec
from evatool.errors import RecipeError
from evatool.model.mim import build_mim
from evatool.model.presets import ModelConfig, resolve_preset
from evatool.objective.mim import MimObjective
from evatool.plan.towers import image_flops, mim_flops
from evatool.recipe import schema
from evatool.recipe.schema import PretrainMimRecipe
from evatool.stages import chain, training_loop, wiring
from evatool.stages.mim_pictures import masked_cosines, save_mim_pictures
from evatool.stages.run_dir import RunOptions
from evatool.stages.teachers import LazyTeacher, PatchTeacher, open_patch_teacher, required_store_path, views_of
from evatool.types import Result

NUM_PICTURES = 6
STORE = "patches"


def run(recipe: PretrainMimRecipe, run: RunOptions) -> Result:
    """Pre-train the image tower of `recipe`, or go on with it; every rank calls it."""
    with wiring.open_job(recipe, run) as job:
        data = open_mim_data(job, recipe)
        with wiring.first_weights(job):
            model = build_mim(
                data.shape,
                predict_dim=data.teacher.facts.width,
                drop_path_rate=recipe.model.drop_path_rate,
                patch_embed_grad_scale=recipe.model.patch_embed_grad_scale,
            )
            objective = MimObjective(model, data.patches, data.loader.stores.get(STORE))
        groups = wiring.build_groups(recipe, objective, model.config)
        engine = wiring.build_job_engine(job, objective, groups)
        state = wiring.start_state(job, engine, groups, data.loader)
        hooks = training_loop.build_hooks(job, model.config)
        flops = flops_per_sample(model.config, data)
        trainer = training_loop.build_trainer(job, objective, engine, data.loader, groups, hooks, state, flops)
        trainer.fit()
        with engine.whole_weights():
            pictures = draw_pictures(job, data, objective)
        path = job.run_dir.path
        following = chain.next_in_chain(recipe, run.name, path)
        following = following or chain.use_image_tower(recipe, recipe.model.preset, path)
        return training_loop.training_result(job, trainer, next_command=following, pictures={"mim_pictures": pictures})


@dataclass
class MimData:
    """What the student learns from."""

    shape: ModelConfig
    """Of the student."""
    mask: MaskSpec
    teacher: LazyTeacher
    patches: PatchTeacher
    """The teacher on the student's grid."""
    views: Views | None
    loader: TrainLoader


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
    return MimData(shape, mask, teacher, PatchTeacher(teacher, shape.grid), views, loader)


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


def flops_per_sample(student: ModelConfig, data: MimData) -> float:
    """Of a step; the teacher's only where it is a CLIP that runs at every step."""
    masked = round(data.mask.mask_ratio * data.mask.grid[0] * data.mask.grid[1])
    has_teacher = data.views is None and data.teacher.facts.config is not None
    return 3 * mim_flops(student, masked) + (image_flops(data.teacher.config, all_tokens=True) if has_teacher else 0)


def draw_pictures(job: wiring.Job, data: MimData, objective: MimObjective) -> Path:
    """Save `mim_pictures.png` of the run's first pictures; every rank calls it, rank 0 writes."""
    path = job.run_dir.path / "mim_pictures.png"
    loader = wiring.build_job_loader(
        job,
        data.shape,
        mask=data.mask,
        teacher_size=data.teacher.image_size,
        views=data.views,
        num_preview=NUM_PICTURES,
    )
    batch = next(iter(loader)).to(job.world.device)
    cosine = masked_cosines(objective, batch)
    if job.world.is_main:
        save_mim_pictures(path, batch, cosine)
    return path
