"""What is learned: the losses and their settings. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag, model_validator

from evatool.recipe.schema.base import Section, by_kind
from evatool.recipe.schema.joint import JointMim


class LearnedTemperature(Section):
    """Learned, from the model's first value on, and kept within [1/100, 1]."""

    kind: Literal["learned"] = "learned"


class FixedTemperature(Section):
    """The same from the first step to the last."""

    kind: Literal["fixed"] = "fixed"
    value: Annotated[float, Field(ge=0.01, le=1.0)] = 0.01
    """What similarities are divided by: 0.01 in EVA-CLIP-8B and 18B (docs/reference/eva.md#eva-clip-8b-and-18b)."""


class InfoNceObjective(Section):
    """Contrastive loss over the global batch (docs/reference/eva.md#contrastive-loss)."""

    kind: Literal["infonce"] = "infonce"
    positives: Literal["pair", "equal-captions"] = "pair"
    """`pair`: only the picture's own caption is right. `equal-captions`: every equal caption in the batch is."""
    temperature: Annotated[
        Annotated[LearnedTemperature, Tag("learned")] | Annotated[FixedTemperature, Tag("fixed")], by_kind("learned")
    ] = LearnedTemperature()
    """Whether the temperature of the softmax is learned."""
    mim: JointMim | None = None
    """Masked image modelling beside it, in one stage; none when absent."""


class SigmoidObjective(Section):
    """A yes-or-no question for every pair of the global batch (SigLIP, arXiv 2303.15343)."""

    kind: Literal["sigmoid"] = "sigmoid"
    positives: Literal["pair", "equal-captions"] = "pair"
    """As in `infonce`."""
    initial_scale: Annotated[float, Field(ge=1.0, le=100.0)] = 10.0
    """Factor on the cosines at the start, whatever `[model.init]` brought; learned, and kept within [1, 100]."""
    initial_bias: float = -10.0
    """Added to all similarities at the start; learned. Nearly all pairs of a batch are wrong ones."""
    mim: JointMim | None = None
    """As in `infonce`."""


class MimObjective(Section):
    """Negative cosine to the teacher's patch features at masked places (docs/reference/eva.md#mim-loss)."""

    kind: Literal["mim"] = "mim"
    mask_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.41
    """Target share of masked patches, reached at most; the count is round(mask_ratio N): 105 of 256 in EVA."""
    min_block_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.0625
    """Smallest masked block as a share of the grid: 16 of 256 patches in EVA."""
    masking: Literal["blocks", "random"] = "blocks"
    """`blocks`: rectangles, as EVA-01 and EVA-02. `random`: single patches, equally many in each picture, as EVA-L."""

    @model_validator(mode="after")
    def _blocks_are_of_blocks(self) -> MimObjective:
        default = MimObjective.model_fields["min_block_fraction"].default
        if self.masking == "random" and self.min_block_fraction != default:
            raise ValueError(
                f'min_block_fraction = {self.min_block_fraction} has no effect with masking = "random": leave it out'
            )
        return self
