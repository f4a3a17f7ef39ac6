"""`evatool pretrain-mim`: an image tower learns a CLIP teacher's patch features at places it does not see."""

from __future__ import annotations

from pathlib import Path

from evatool.api import LoadedClip
from evatool.data.masking import MaskSpec
from evatool.errors import RecipeError
from evatool.model.mim import build_mim
from evatool.model.presets import ModelConfig, resolve_preset
from evatool.objective.mim import MimObjective
from evatool.plan.towers import image_flops, mim_flops
from evatool.recipe.schema import PretrainMimRecipe
from evatool.stages import chain, training_loop, wiring
from evatool.stages.mim_pictures import masked_cosines, save_mim_pictures
from evatool.stages.run_dir import RunOptions
from evatool.types import Result

NUM_PICTURES = 6


def run(recipe: PretrainMimRecipe, run: RunOptions) -> Result:
    """Pre-train the image tower of `recipe`, or go on with it; every rank calls it."""
    with wiring.open_job(recipe, run) as job:
        teacher = wiring.load_teacher(job, recipe.teacher)
        shape = resolve_preset(recipe.model.preset).with_image_size(recipe.model.image_size)
        check_grids(shape, teacher.config)
        mask = MaskSpec(shape.grid, recipe.objective.mask_ratio, recipe.objective.min_block_fraction)
        loader = wiring.build_job_loader(job, shape, mask=mask, teacher=teacher)
        with wiring.first_weights(job):
            model = build_mim(
                shape,
                predict_dim=teacher.embed_dim,
                drop_path_rate=recipe.model.drop_path_rate,
                patch_embed_grad_scale=recipe.model.patch_embed_grad_scale,
            )
            objective = MimObjective(model, teacher, recipe.objective)
        groups = wiring.build_groups(recipe, objective, model.config)
        engine = wiring.build_job_engine(job, objective, groups)
        state = wiring.start_state(job, engine, groups, loader)
        hooks = training_loop.build_hooks(job, model.config)
        masked = round(recipe.objective.mask_ratio * shape.grid[0] * shape.grid[1])
        flops = 3 * mim_flops(model.config, masked) + image_flops(teacher.config, all_tokens=True)
        trainer = training_loop.build_trainer(job, objective, engine, loader, groups, hooks, state, flops)
        trainer.fit()
        with engine.whole_weights():
            pictures = draw_pictures(job, shape, mask, teacher, objective)
        path = job.run_dir.path
        following = chain.next_in_chain(recipe, run.name, path)
        following = following or chain.use_image_tower(recipe, recipe.model.preset, path)
        return training_loop.training_result(job, trainer, next_command=following, pictures={"mim_pictures": pictures})


def check_grids(student: ModelConfig, teacher: ModelConfig) -> None:
    """Raises: RecipeError where student and teacher do not cut a picture into the same patches."""
    if student.grid == teacher.grid:
        return
    fitting = teacher.grid[0] * student.patch_size
    described = [
        f"{c.grid[0]} x {c.grid[1]} ({c.name}: {c.image_size} pixels, patches of {c.patch_size})"
        for c in (student, teacher)
    ]
    raise RecipeError(
        f"the student's patch grid is {described[0]}, the teacher's {described[1]}",
        where="model.preset, model.image_size and teacher.model",
        expected="the same grid, since each student patch learns the feature of the teacher's patch at its place",
        fix=f"set model.image_size = {fitting}, or choose another student or teacher",
    )


def draw_pictures(
    job: wiring.Job, shape: ModelConfig, mask: MaskSpec, teacher: LoadedClip, objective: MimObjective
) -> Path:
    """Save `mim_pictures.png` of the run's first pictures; every rank calls it, rank 0 writes."""
    path = job.run_dir.path / "mim_pictures.png"
    loader = wiring.build_job_loader(job, shape, mask=mask, teacher=teacher, num_preview=NUM_PICTURES)
    batch = next(iter(loader)).to(job.world.device)
    cosine = masked_cosines(objective, batch)
    if job.world.is_main:
        save_mim_pictures(path, batch, cosine)
    return path
