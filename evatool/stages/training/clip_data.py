"""What `train-clip` learns from: image-text batches, and a patch teacher where masked image modelling stands beside."""

from __future__ import annotations

from dataclasses import dataclass

from evatool.core.errors import RecipeError
from evatool.data.train.loader import TrainLoader
from evatool.model.presets import ModelConfig
from evatool.objective.build import PatchTargets
from evatool.plan.towers import image_flops, mim_flops, text_flops
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
        """Model FLOPs of a sample's forward and backward pass, and of the teacher's forward pass where it runs."""
        flops = 3 * (image_flops(config, recipe.model.patch_dropout) + text_flops(config))
        return flops if self.mim is None else flops + _mim_flops(config, self.mim)


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


def _mim_flops(config: ModelConfig, data: MimData) -> int:
    """What masked image modelling adds to a sample: three passes over the masked image, and the teacher's where it is a
    CLIP that runs at every step."""
    masked = data.mask.generator().num_masked
    head = 2 * masked * config.width * data.teacher.facts.width
    has_teacher = data.views is None and data.teacher.facts.config is not None
    teacher = image_flops(data.teacher.config, all_tokens=True) if has_teacher else 0
    return 3 * (mim_flops(config, masked) + head) + teacher
