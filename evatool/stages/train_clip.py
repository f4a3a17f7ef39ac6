"""`evatool train-clip`: contrastive image-text training, alone or with masked image modelling beside it."""

from __future__ import annotations

from evatool.objective.clip import ClipObjective
from evatool.plan.towers import image_flops, text_flops
from evatool.recipe.schema import TrainClipRecipe
from evatool.runs import chain
from evatool.runs.result import Result
from evatool.runs.run_dir import RunOptions
from evatool.stages.training import build as wiring
from evatool.stages.training import joint
from evatool.stages.training import loop as training_loop


def run(recipe: TrainClipRecipe, run: RunOptions) -> Result:
    """Train the CLIP model of `recipe`, or go on with it; every rank calls it."""
    with wiring.open_job(recipe, run) as job:
        config = wiring.clip_config(recipe.model)
        mim = joint.open_joint_data(job, recipe, config)
        loader = mim.loader if mim else wiring.build_job_loader(job, config, context_length=config.context_length)
        with wiring.initial_weights(job):
            model = wiring.build_clip_model(config, recipe.model, is_resumed=job.saved is not None, sources=job.sources)
            objective: ClipObjective = (
                joint.build_joint_objective(model, recipe, mim) if mim else ClipObjective(model, recipe.objective)
            )
        groups = wiring.build_groups(recipe, objective, config)
        engine = wiring.build_job_engine(job, objective, groups)
        state = wiring.start_state(job, engine, groups, loader)
        hooks = training_loop.build_hooks(job, config, model=model, contrastive_key=objective.chance_loss)
        flops = 3 * (image_flops(config, recipe.model.patch_dropout) + text_flops(config))
        if mim:
            flops += joint.joint_flops(config, mim)
        trainer = training_loop.build_trainer(job, objective, engine, loader, groups, hooks, state, flops)
        trainer.fit()
        path = job.run_dir.path
        following = chain.next_in_chain(recipe, run.name, path) or chain.use_clip(recipe, path)
        return training_loop.training_result(job, trainer, next_command=following)
