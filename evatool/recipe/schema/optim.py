"""How weights move: optimiser settings by tower, and the learning rate over the run. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from evatool.recipe.schema.base import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section


class GroupSection(Section):
    """Optimiser settings of one tower."""

    lr: PositiveFloat
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.05
    """Decoupled weight decay of matrices; biases, norms, position and class embeddings have none
    (docs/reference/eva.md#parameter-groups).
    """
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Factor on the learning rate per layer away from the head."""


class OptimSection(Section):
    """What all optimisers have: one group per tower, layer and decay."""

    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    """Decay of the first and second moments; EVA's intended values (docs/reference/eva.md#betas-by-name)."""
    eps: PositiveFloat = 1e-6
    """Added to the root of the second moment."""
    grad_clip_norm: PositiveFloat | None = None
    """Largest global gradient norm; no clipping when absent."""
    visual: GroupSection
    """Image tower."""
    text: GroupSection | None = None
    """Text tower; required where there is one."""
    other: GroupSection | None = None
    """Parameters in neither tower (temperature, prediction head, projections); as `visual` when absent."""


class AdamWSection(OptimSection):
    """AdamW."""

    kind: Literal["adamw"] = "adamw"


class LambSection(OptimSection):
    """LAMB, the optimiser of EVA-CLIP's released runs; the same under every engine and world size (docs/optim.md)."""

    kind: Literal["lamb"] = "lamb"
    variant: Literal["deepspeed", "timm"] = "deepspeed"
    """Formula: `deepspeed` as EVA trained (ratios within [0.01, 10], every tensor adapted), or timm's `Lamb`."""
    granularity: Literal["tensor", "flat-shard"] = "tensor"
    """What has a trust ratio of its own: a `tensor`, or as in EVA's runs a rank's slice of a group (`flat-shard`)."""
    virtual_world_size: Positive | None = None
    """Number of ranks whose slices `flat-shard` imitates, on any number of real ones."""

    @model_validator(mode="after")
    def _slices_are_counted(self) -> LambSection:
        if self.granularity == "flat-shard" and self.virtual_world_size is None:
            raise ValueError('granularity = "flat-shard" needs virtual_world_size: the number of ranks to imitate')
        if self.granularity == "tensor" and self.virtual_world_size is not None:
            raise ValueError('virtual_world_size has no effect with granularity = "tensor"')
        return self


class ScheduleSection(Section):
    """Linear warm-up from 0, then cosine to `min_lr_fraction` of the peak (docs/reference/eva.md#clip-settings)."""

    kind: Literal["warmup-cosine"] = "warmup-cosine"
    warmup_samples: NonNegative = 0
    """Length of the warm-up in samples seen."""
    min_lr_fraction: Fraction = 0.0
    """Learning rate at the end as a share of the peak."""


class ConstantCooldownSection(Section):
    """Linear warm-up from 0, then the peak, then a cooldown to `min_lr_fraction` of it over the last samples."""

    kind: Literal["constant-cooldown"] = "constant-cooldown"
    warmup_samples: NonNegative = 0
    """Length of the warm-up in samples seen."""
    cooldown_samples: NonNegative = 0
    """Length of the cooldown at the end of the run in samples seen."""
    cooldown_power: PositiveFloat = 1.0
    """Shape of the cooldown: the peak's share falls as (what is left of it) to this power; 1 is linear."""
    min_lr_fraction: Fraction = 0.0
    """Learning rate at the end as a share of the peak."""
