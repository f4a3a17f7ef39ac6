"""What is learned: the losses and their settings. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag, model_validator

from evatool.recipe.schema.base import Section, by_kind
from evatool.recipe.schema.joint import JointMim

TILE_SIDE = {"cpu": 1024, "cuda": 4096}
"""Rows and columns of the tiles in which losses between samples go through the similarities of a batch, by device.

Large enough for full speed of the matrix products, small beside the features. Objectives and the planner read it."""


class LearnedTemperature(Section):
    """A temperature that is learned from the model's first value on, and kept within [1/100, 1]."""

    kind: Literal["learned"] = "learned"
    """Selects a learned temperature."""


class FixedTemperature(Section):
    """A temperature that stays the same from the first step to the last."""

    kind: Literal["fixed"] = "fixed"
    """Selects a fixed temperature."""
    value: Annotated[float, Field(ge=0.01, le=1.0)] = 0.01
    """Number that similarities are divided by. It is 0.01 in EVA-CLIP-8B and 18B
    (docs/reference/eva.md#eva-clip-8b-and-18b)."""


class InfoNceObjective(Section):
    """Softmax contrastive loss over the global batch (docs/reference/eva.md#contrastive-loss)."""

    kind: Literal["infonce"] = "infonce"
    """Selects the softmax loss of CLIP."""
    positives: Literal["pair", "equal-captions"] = "pair"
    """Captions that count as right for a picture. `pair` is only its own; `equal-captions` is every equal caption in
    the batch, which suits sets in which captions repeat."""
    temperature: Annotated[
        Annotated[LearnedTemperature, Tag("learned")] | Annotated[FixedTemperature, Tag("fixed")], by_kind("learned")
    ] = LearnedTemperature()
    """Whether the temperature of the softmax is learned or fixed."""
    mim: JointMim | None = None
    """Masked image modelling beside the contrastive loss, in one stage. There is none when it is absent; it needs
    `[teacher]`."""


class SigmoidObjective(Section):
    """Sigmoid contrastive loss: a yes-or-no question for every pair of the global batch (SigLIP, arXiv 2303.15343)."""

    kind: Literal["sigmoid"] = "sigmoid"
    """Selects the sigmoid loss of SigLIP."""
    positives: Literal["pair", "equal-captions"] = "pair"
    """Captions that count as right for a picture. `pair` is only its own; `equal-captions` is every equal caption in
    the batch, which suits sets in which captions repeat."""
    initial_scale: Annotated[float, Field(ge=1.0, le=100.0)] = 10.0
    """Factor on the cosines at the start, whatever `[model.init]` brought. It is learned, and kept within [1, 100]. The
    default is SigLIP's."""
    initial_bias: float = -10.0
    """Number added to all similarities at the start; it is learned. Nearly all pairs of a batch are wrong ones, so it
    begins at a strong no. The default is SigLIP's."""
    mim: JointMim | None = None
    """Masked image modelling beside the contrastive loss, in one stage. There is none when it is absent; it needs
    `[teacher]`."""


class MimObjective(Section):
    """Negative cosine to the teacher's patch features at masked places (docs/reference/eva.md#mim-loss)."""

    kind: Literal["mim"] = "mim"
    """Selects masked image modelling, the only objective of this stage."""
    mask_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.41
    """Target share of masked patches, between 0 and 1: at most round(mask_ratio N) of N patches are masked. EVA's value
    is 0.41, 105 of 256; EVA-L's, with `masking = "random"`, is 0.75."""
    min_block_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.0625
    """Area of the smallest masked block as a share of the grid. EVA's value is 1/16, 16 of 256 patches. It has no
    effect with `masking = "random"`."""
    masking: Literal["blocks", "random"] = "blocks"
    """Shape of the mask. `blocks` hides rectangles, as EVA-01 and EVA-02; `random` hides single patches, equally many
    in each picture, as EVA-L, whose masked autoencoder needs it."""

    @model_validator(mode="after")
    def _blocks_are_of_blocks(self) -> MimObjective:
        default = MimObjective.model_fields["min_block_fraction"].default
        if self.masking == "random" and self.min_block_fraction != default:
            raise ValueError(
                f'min_block_fraction = {self.min_block_fraction} has no effect with masking = "random": leave it out'
            )
        return self
