"""Masked image modelling in the same stage as the contrastive loss. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from evatool.recipe.schema.base import PositiveFloat, Section

if TYPE_CHECKING:
    from evatool.recipe.schema.model import ClipModelSection
    from evatool.recipe.schema.teacher import PatchTeacherSection


class JointMim(Section):
    """Masked image modelling beside the contrastive loss: the image tower also predicts a teacher's patch features.

    It does so at hidden places of a second, masked view of the same picture. `[teacher]` says whose features they are.
    Mask token and prediction head belong to the objective and are not exported.
    """

    weight: PositiveFloat = 1.0
    """Weight of the negative cosine; the contrastive loss has 1. The negative cosine lies between -1 and 1, so it is
    the smaller loss at the start; docs/evidence.md shows what it brings at toy size."""
    mask_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.41
    """Target share of masked patches, as in `pretrain-mim`: at most round(mask_ratio N) of N patches are masked. EVA's
    value is 0.41, 105 of 256."""
    min_block_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.0625
    """Area of the smallest masked block as a share of the grid, as in `pretrain-mim`. EVA's value is 1/16, 16 of 256
    patches."""


def check_joint(mim: JointMim | None, teacher: PatchTeacherSection | None, model: ClipModelSection) -> None:
    """Raises: ValueError where the two tables do not come together, or the model leaves nothing to learn."""
    if mim is None:
        if teacher is not None:
            raise ValueError(
                "[teacher] has no effect in train-clip without [objective.mim]: add it, or use the stage distill"
            )
        return
    if teacher is None:
        raise ValueError("[objective.mim] predicts a teacher's patch features: say in [teacher] whose")
    shares = [model.patch_dropout, *(share for _, share in model.patch_dropout_schedule)]
    if max(shares) > 0:
        raise ValueError(
            f"model.patch_dropout = {max(shares):g} would drop the masked places that [objective.mim] predicts: set it "
            "to 0, or take two stages, pretrain-mim and then train-clip with patch dropout"
        )
    if model.lock.visual == "all":
        raise ValueError(
            '[objective.mim] cannot teach a frozen tower: unset model.lock.visual = "all", or leave [objective.mim] out'
        )
