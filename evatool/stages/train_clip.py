"""`evatool train-clip`: contrastive image-text training, alone or with masked image modelling beside it."""

from __future__ import annotations

from evatool.objective.build import build_objective
from evatool.recipe.schema import TrainClipRecipe
from evatool.runs.chain import next_command
from evatool.runs.result import Result
from evatool.runs.run_dir import RunOptions
from evatool.stages.training import build as wiring
from evatool.stages.training import loop as training_loop
from evatool.stages.training.clip_data import open_clip_data


def run(recipe: TrainClipRecipe, run: RunOptions) -> Result:
    """Train the CLIP model of `recipe`, or go on with it; every rank calls it."""
    with wiring.open_job(recipe, run) as job:
        config = wiring.clip_config(recipe.model)
        data = open_clip_data(job, recipe, config)
        with wiring.initial_weights(job):
            model = wiring.build_clip_model(config, recipe.model, is_resumed=job.saved is not None, sources=job.sources)
            objective = build_objective(recipe.objective, model, patches=data.patches)
        groups = wiring.build_groups(recipe, objective, config)
        engine = wiring.build_job_engine(job, objective, groups)
        state = wiring.start_state(job, engine, groups, data.loader)
        hooks = training_loop.build_hooks(job, config, model=model, contrastive_key=objective.chance_loss)
        flops = data.flops_per_sample(recipe, config)
        trainer = training_loop.build_trainer(job, objective, engine, data.loader, groups, hooks, state, flops)
        trainer.fit()
        following = next_command(recipe, run.name, job.run_dir.path)
        return training_loop.training_result(job, trainer, next_command=following)
