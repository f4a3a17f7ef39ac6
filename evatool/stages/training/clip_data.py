"""What `train-clip` learns from: image-text batches, and a patch teacher where masked image modelling stands beside."""

from __future__ import annotations

from dataclasses import dataclass

from evatool.core.errors import RecipeError
from evatool.data.train.loader import TrainLoader
from evatool.model.presets import ModelConfig
from evatool.objective.build import PatchTargets
from evatool.plan.costs import flops_per_sample
from evatool.recipe.schema import TrainClipRecipe
from evatool.stages.training import build as wiring
from evatool.stages.training.mim_data import MimData, open_masked_data


@dataclass
class ClipData:
    """The batches, and the teacher of patch features where the recipe has `[objective.mim]`."""

    loader: TrainLoader
    mim: MimData | None = None

    @property
    def patches(self) -> PatchTargets | None:
        """What the objective's masked image modelling needs."""
        return None if self.mim is None else self.mim.patch_targets

    def flops_per_sample(self, recipe: TrainClipRecipe, config: ModelConfig) -> int:
        """Operations a sample, a teacher's forward pass among them where it runs, as `plan.costs` counts them."""
        return flops_per_sample(recipe, config) if self.mim is None else self.mim.flops_per_sample(recipe, config)


def open_clip_data(job: wiring.Job, recipe: TrainClipRecipe, config: ModelConfig) -> ClipData:
    """Teacher, masks and batches with captions; every rank calls it.

    Raises: RecipeError for an image tower that is none of EVA's where there are masks, and as `open_masked_data`.
    """
    mim = recipe.objective.mim
    if mim is None:
        return ClipData(wiring.build_job_loader(job, config, context_length=config.context_length))
    assert recipe.teacher is not None, "the schema lets no joint objective through without a teacher"
    if not config.is_eva:
        raise RecipeError(
            f"{config.name} has open_clip's image tower, which knows no mask tokens",
            where="objective.mim and model.preset",
            expected="a preset with an EVA tower",
            fix="choose one (docs/models.md), or unset objective.mim",
        )
    data = open_masked_data(job, config, mim, recipe.teacher, context_length=config.context_length)
    return ClipData(data.loader, data)
