"""How weights move: optimiser settings by tower, and the learning rate over the run. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from evatool.recipe.schema.base import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section


class GroupSection(Section):
    """Optimiser settings of one tower."""

    lr: PositiveFloat
    """Peak learning rate, reached at the end of the warm-up."""
    weight_decay: NonNegativeFloat = 0.05
    """Decoupled weight decay of matrices. Biases, norms, position and class embeddings have none
    (docs/reference/eva.md#parameter-groups)."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Factor on the learning rate for each layer away from the head. At 1 all layers learn alike; below 1 the first
    layers of a tower that was trained before change less."""


class OptimSection(Section):
    """Settings that all optimisers have; parameters form one group for each tower, layer and decay."""

    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    """Decay of the first and second moments, from 0 to 1. The defaults are EVA's intended values
    (docs/reference/eva.md#betas-by-name); a second one below Adam's usual 0.999 follows changes of the gradient sooner.
    """
    eps: PositiveFloat = 1e-6
    """Number added to the root of the second moment, against division by almost nothing. EVA's value is 1e-6."""
    grad_clip_norm: PositiveFloat | None = None
    """Largest norm of the gradient of all parameters together; a larger gradient is scaled down to it. Nothing is
    clipped when it is absent. Set it where the loss has spikes."""
    visual: GroupSection
    """Settings of the image tower."""
    text: GroupSection | None = None
    """Settings of the text tower. They are required where there is one."""
    other: GroupSection | None = None
    """Settings of parameters in neither tower: temperature, prediction head and projections. They are as `visual`'s
    when absent."""


class AdamWSection(OptimSection):
    """The optimiser AdamW."""

    kind: Literal["adamw"] = "adamw"
    """Selects AdamW."""


class LambSection(OptimSection):
    """The optimiser LAMB of EVA-CLIP's released runs.

    It computes the same under every engine and world size (docs/optim.md).
    """

    kind: Literal["lamb"] = "lamb"
    """Selects LAMB."""
    variant: Literal["deepspeed", "timm"] = "deepspeed"
    """Formula. `deepspeed` is the one that EVA trained with: trust ratios within [0.01, 10], every tensor adapted.
    `timm` is timm's `Lamb`, without bounds and without adaptation of tensors that have no decay."""
    granularity: Literal["tensor", "flat-shard"] = "tensor"
    """What has a trust ratio of its own: each weight tensor (`tensor`, LAMB as published), or each rank's slice of a
    parameter group (`flat-shard`, as EVA's runs did). Choose the latter only to study those runs."""
    virtual_world_size: Positive | None = None
    """Number of ranks whose slices `flat-shard` imitates, on any number of real ones. `tensor` has none."""

    @model_validator(mode="after")
    def _slices_are_counted(self) -> LambSection:
        if self.granularity == "flat-shard" and self.virtual_world_size is None:
            raise ValueError('granularity = "flat-shard" needs virtual_world_size: the number of ranks to imitate')
        if self.granularity == "tensor" and self.virtual_world_size is not None:
            raise ValueError('virtual_world_size has no effect with granularity = "tensor"')
        return self


class ScheduleSection(Section):
    """Linear warm-up from 0, then half a cosine down to `min_lr_fraction` of the peak.

    It is EVA's schedule (docs/reference/eva.md#clip-settings).
    """

    kind: Literal["warmup-cosine"] = "warmup-cosine"
    """Selects warm-up and cosine, the schedule of EVA."""
    warmup_samples: NonNegative = 0
    """Length of the warm-up in samples seen. Without one (0) large models often diverge at the start."""
    min_lr_fraction: Fraction = 0.0
    """Learning rate at the end of the run, as a share of the peak."""


class ConstantCooldownSection(Section):
    """Linear warm-up from 0, then the peak, then a cooldown to `min_lr_fraction` of the peak over the last samples."""

    kind: Literal["constant-cooldown"] = "constant-cooldown"
    """Selects warm-up, constant rate and cooldown. A run can be lengthened before its cooldown without starting again.
    """
    warmup_samples: NonNegative = 0
    """Length of the warm-up in samples seen. Without one (0) large models often diverge at the start."""
    cooldown_samples: NonNegative = 0
    """Length of the cooldown at the end of the run, in samples seen."""
    cooldown_power: PositiveFloat = 1.0
    """Shape of the cooldown: the share of the peak falls as (what is left of the cooldown) to this power. At 1 it falls
    linearly; above 1 it falls faster at first."""
    min_lr_fraction: Fraction = 0.0
    """Learning rate at the end of the run, as a share of the peak."""
