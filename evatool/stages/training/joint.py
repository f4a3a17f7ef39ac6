"""What `train-clip` builds where masked image modelling stands beside the contrastive loss."""

from __future__ import annotations

from functools import partial

from open_clip import CustomTextCLIP

from evatool.core.errors import RecipeError
from evatool.model.mim import masked_tokens
from evatool.model.presets import ModelConfig
from evatool.objective.terms.joint import JointObjective
from evatool.plan.towers import image_flops, mim_flops
from evatool.recipe.schema import TrainClipRecipe
from evatool.stages.training import build as wiring
from evatool.stages.training.mim_data import STORE, MimData, open_masked_data


def open_joint_data(job: wiring.Job, recipe: TrainClipRecipe, config: ModelConfig) -> MimData | None:
    """Teacher, masks and batches with captions; None where the recipe has no `[objective.mim]`.

    Raises: RecipeError for an image tower that is none of EVA's, and as `open_masked_data`.
    """
    if recipe.objective.mim is None:
        return None
    assert recipe.teacher is not None, "the schema lets no joint objective through without a teacher"
    if not config.is_eva:
        raise RecipeError(
            f"{config.name} has open_clip's image tower, which knows no mask tokens",
            where="objective.mim and model.preset",
            expected="a preset with an EVA tower",
            fix="choose one (docs/models.md), or unset objective.mim",
        )
    return open_masked_data(job, config, recipe.objective.mim, recipe.teacher, context_length=config.context_length)


def build_joint_objective(model: CustomTextCLIP, recipe: TrainClipRecipe, data: MimData) -> JointObjective:
    """Both losses around the model's one image tower."""
    return JointObjective(
        model,
        recipe.objective,
        tower=partial(masked_tokens, model.visual.trunk),
        width=data.shape.width,
        predict_dim=data.teacher.facts.width,
        num_masked=data.mask.generator().num_masked,
        teacher=data.patches,
        store=data.loader.stores.get(STORE),
    )


def joint_flops(config: ModelConfig, data: MimData) -> int:
    """What the second loss adds to a sample: three passes over the masked picture, and the teacher's where it is a CLIP
    that runs at every step."""
    masked = data.mask.generator().num_masked
    head = 2 * masked * config.width * data.teacher.facts.width
    has_teacher = data.views is None and data.teacher.facts.config is not None
    teacher = image_flops(data.teacher.config, all_tokens=True) if has_teacher else 0
    return 3 * (mim_flops(config, masked) + head) + teacher
