"""`evatool pretrain-mim`: an image tower learns a frozen model's patch features at places it does not see."""

from __future__ import annotations

from evatool.model.mim import build_mim
from evatool.objective.build import build_objective
from evatool.recipe.schema import PretrainMimRecipe
from evatool.runs.chain import next_command
from evatool.runs.result import Result
from evatool.runs.run_dir import RunOptions
from evatool.stages.training import build as wiring
from evatool.stages.training import loop as training_loop
from evatool.stages.training.mim_data import open_mim_data
from evatool.stages.training.mim_hooks import ImageSheets, Validation


def run(recipe: PretrainMimRecipe, run: RunOptions) -> Result:
    """Pre-train the image tower of `recipe`, or go on with it; every rank calls it."""
    with wiring.open_job(recipe, run) as job:
        data = open_mim_data(job, recipe)
        with wiring.initial_weights(job):
            model = build_mim(
                data.shape,
                predict_dim=data.teacher.facts.width,
                drop_path_rate=recipe.model.drop_path_rate,
                patch_embed_grad_scale=recipe.model.patch_embed_grad_scale,
            )
            objective = build_objective(recipe.objective, model, patches=data.patch_targets)
        groups = wiring.build_groups(recipe, objective, model.config)
        engine = wiring.build_job_engine(job, objective, groups)
        state = wiring.start_state(job, engine, groups, data.loader)
        images = ImageSheets(recipe.images, job, data, objective)
        hooks = [images, *training_loop.build_hooks(job, model.config)]
        if recipe.validation is not None:  # before what writes its figure
            hooks.insert(0, Validation(recipe.validation, job, recipe, data, objective))
        flops = data.flops_per_sample(recipe, model.config)
        trainer = training_loop.build_trainer(job, objective, engine, data.loader, groups, hooks, state, flops)
        trainer.fit()
        with engine.summon_full_weights():
            sheet = images.draw(job.run_dir.path / "mim_pictures.png")
        following = next_command(recipe, run.name, job.run_dir.path)
        return training_loop.training_result(job, trainer, next_command=following, images={"mim_pictures": sheet})
