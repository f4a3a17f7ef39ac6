"""Masked image modelling in the same stage as the contrastive loss. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from evatool.recipe.schema.base import PositiveFloat, Section

if TYPE_CHECKING:
    from evatool.recipe.schema.model import ClipModelSection
    from evatool.recipe.schema.teacher import PatchTeacherSection


class JointMim(Section):
    """The image tower also predicts a teacher's patch features, at masked places of a second, masked view of the same
    picture; `[teacher]` says whose. Mask token and prediction head belong to the objective and are not exported."""

    weight: PositiveFloat = 1.0
    """Of the negative cosine, beside the contrastive loss at 1."""
    mask_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.41
    """As in pretrain-mim."""
    min_block_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.0625
    """As in pretrain-mim."""


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
