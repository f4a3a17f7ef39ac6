"""Length and batch of a training run, what happens when a step goes wrong, when it is saved. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from evatool.recipe.schema.base import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section


class GuardSection(Section):
    """What becomes of a step whose loss or gradient is not finite, overflows in fp16, or is a spike.

    Such a step never reaches the weights, on any rank."""

    policy: Literal["skip", "rollback", "stop"] = "skip"
    """`skip`: go on; beyond `budget`, one rollback to the last checkpoint and on behind the samples met since, then
    exit 80. `rollback`: the one rollback at the first such step. `stop`: exit 80 at the first."""
    budget: NonNegative = 8
    """Skipped steps that `skip` bears in any `window` steps."""
    window: Positive = 100
    """Steps over which they are counted."""
    spike_sigma: NonNegativeFloat = 6.0
    """A loss this many standard deviations above the mean of the last `spike_window` is a spike; 0: only what is not
    finite is skipped."""
    spike_window: Annotated[int, Field(ge=8)] = 128
    """Losses that a new one is compared with; no spike is seen before there are so many."""


class TrainSection(Section):
    """Length, batch and precision."""

    samples_seen: Positive
    """Length of the run in samples."""
    global_batch_size: Positive
    """Samples of one optimiser step over all ranks."""
    micro_batch_size: Positive | None = None
    """Samples of a rank that go through the model at once; all of its share of the batch when absent. The gradient
    stays that of the whole batch: a contrastive loss keeps every sample of it as a negative (docs/train.md)."""
    seed: int = 0
    """Seed of initialisation, order, augmentation and masks."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward pass; weights and optimiser stay float32. `fp16` scales the loss dynamically."""
    log_every: Positive = 10
    """Steps between two log lines."""
    guard: GuardSection = GuardSection()
    """Steps that go wrong."""
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Decay of a moving average of the weights, kept in checkpoints as `ema.safetensors`; none when absent."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where the figures go beside `metrics.jsonl`; needs the extra `track`."""

    @model_validator(mode="after")
    def _at_least_one_step(self) -> TrainSection:
        if self.samples_seen < self.global_batch_size:
            raise ValueError(
                f"samples_seen = {self.samples_seen} is less than one step of "
                f"global_batch_size = {self.global_batch_size}"
            )
        if self.micro_batch_size is not None and self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size = {self.micro_batch_size} does not divide "
                f"global_batch_size = {self.global_batch_size}"
            )
        return self

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole run: samples_seen / global_batch_size, rounded down."""
        return self.samples_seen // self.global_batch_size


class EvaluateSection(Section):
    """Zero-shot evaluation of the model while it trains, sharded over ranks."""

    every_steps: Positive
    """Steps between two evaluations, a multiple of `train.log_every`; the end of the run is always evaluated."""
    data: Path
    """Folder with the evaluation sets, as `[eval]` has it."""
    suite: str = "drawings"
    """Name of a suite of evaluation sets (docs/eval.md)."""
    sets: list[str] | None = None
    """Only these sets of the suite."""
    batch_size: Positive = 256
    """Pictures a forward pass on each rank."""


class CheckpointSection(Section):
    """When the run is saved. Its end, a signal and a file named STOP in the run folder always save it."""

    every_steps: Positive | None = None
    """Steps between two saves."""
    every_minutes: PositiveFloat | None = None
    """Minutes between two saves, beside those by steps."""
    keep: Positive = 2
    """Newest checkpoints kept."""
    keep_every_steps: Positive | None = None
    """Checkpoints at multiples of this step are kept for good."""

    @model_validator(mode="after")
    def _kept_ones_are_saved(self) -> CheckpointSection:
        kept, saved = self.keep_every_steps, self.every_steps
        if kept is not None and (saved is None or kept % saved):
            raise ValueError(
                f"keep_every_steps = {kept} keeps nothing: no save falls on its multiples; make it a multiple of "
                f"every_steps, which is {'absent' if saved is None else saved}"
            )
        return self
