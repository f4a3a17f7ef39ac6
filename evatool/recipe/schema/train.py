"""Length and batch of a training run, what happens when a step goes wrong, when it is saved. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from evatool.recipe.schema.base import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section


class GuardSection(Section):
    """What becomes of a step whose loss or gradient is not finite, overflows in fp16, or is a spike.

    Such a step never reaches the weights, on any rank.
    """

    policy: Literal["skip", "rollback", "stop"] = "skip"
    """What happens after such a step. `skip` leaves it out and goes on; after more than `budget` of them the run
    returns once to its last checkpoint and leaves out the samples that it has met since, and the next time it ends with
    exit code 80. `rollback` returns at the first such step, once, and ends at the next. `stop` ends with exit code 80
    at the first."""
    budget: NonNegative = 8
    """Number of skipped steps that `skip` allows within any `window` steps. Raise it where fp16 overflows often."""
    window: Positive = 100
    """Number of steps over which the skipped ones are counted."""
    spike_sigma: NonNegativeFloat = 6.0
    """Number of standard deviations above the mean of the last `spike_window` losses from which a loss counts as a
    spike. With 0 only losses and gradients that are not finite are skipped."""
    spike_window: Annotated[int, Field(ge=8)] = 128
    """Number of earlier losses that a new one is compared with. No spike is seen before there are so many."""


class TrackingSection(Section):
    """Where a run stands in Weights & Biases and trackio.

    What is absent is taken from the environment (for Weights & Biases: `WANDB_PROJECT`, `WANDB_ENTITY`,
    `WANDB_RUN_GROUP`, `WANDB_RUN_ID`), and then from the default.
    """

    project: Annotated[str, Field(min_length=1)] | None = None
    """Project that the run is shown in. It is `evatool` when neither this nor the environment names one."""
    entity: Annotated[str, Field(min_length=1)] | None = None
    """User or team that owns the project, in Weights & Biases alone. It is the one that is logged in when absent."""
    group: Annotated[str, Field(min_length=1)] | None = None
    """Group that the run is shown in, for instance with its repetitions under other seeds. It is in none when absent.
    """
    run_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")] | None = None
    """Identity of the run. When absent one is drawn at the first start and kept in `tracker.json` of the run folder, so
    that a resumed run goes on in the same place and no two runs share one. Set it to go on in a run that exists."""


class TrainSection(Section):
    """Length, batch and precision of the run, and what is recorded of it."""

    samples_seen: Positive
    """Length of the run in samples. It is divided by `global_batch_size` and rounded down to whole steps."""
    global_batch_size: Positive
    """Number of samples in one optimiser step over all ranks. A contrastive loss compares each picture with all
    captions of it, so results depend on it; it must divide over the ranks."""
    micro_batch_size: Positive | None = None
    """Number of samples of a rank that go through the model at once; the rank's whole share of the batch when absent.
    Lower it until the run fits into memory: the gradient stays that of the whole batch, and a contrastive loss keeps
    every sample of it as a negative (docs/train.md)."""
    seed: int = 0
    """Seed of first weights, order of samples, augmentation and masks. Two runs with the same seed and recipe see the
    same samples; change it to measure how much results vary."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward pass; weights and optimiser stay float32. `bf16` suits GPUs that have it; `fp16` is for
    older ones and scales the loss dynamically; `fp32`, the default, is the reference and runs everywhere."""
    log_every: Positive = 10
    """Number of steps between two lines of the log and of `metrics.jsonl`. Each one makes a GPU wait, so keep it at 10
    or more there."""
    guard: GuardSection = GuardSection()
    """What becomes of steps that go wrong."""
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Decay of a moving average of the weights, between 0 and 1, such as 0.9999. Checkpoints have it as
    `ema.safetensors`. None is kept when it is absent; it costs memory for one more copy of the weights."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Programs that get the metrics beside `metrics.jsonl`. They need the extra `track` (`pip install
    'evatool[track]'`)."""
    tracking: TrackingSection = TrackingSection()
    """Project, owner, group and identity of the run in `wandb` and `trackio`."""

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

    @model_validator(mode="after")
    def _tracking_reaches_a_tracker(self) -> TrainSection:
        named = [name for name, value in self.tracking.model_dump().items() if value is not None]
        if named and not {"wandb", "trackio"} & set(self.trackers):
            raise ValueError(f"tracking.{named[0]} has no effect: name wandb or trackio in trackers")
        if "entity" in named and "wandb" not in self.trackers:
            raise ValueError("tracking.entity has no effect: name wandb in trackers, or leave it out")
        return self

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole run: samples_seen / global_batch_size, rounded down."""
        return self.samples_seen // self.global_batch_size


class EvaluateSection(Section):
    """Zero-shot evaluation of the model while it trains, divided over the ranks."""

    every_steps: Positive
    """Number of steps between two evaluations, a multiple of `train.log_every`. The end of the run is always evaluated.
    """
    data: Path
    """Folder with the evaluation sets, one folder for each set."""
    suite: str = "drawings"
    """Name of a suite of evaluation sets, or the path of a suite file of your own (docs/eval.md)."""
    sets: list[str] | None = None
    """Names of the sets of the suite to evaluate. All are evaluated when it is absent; a few small ones keep the run
    fast."""
    batch_size: Positive = 256
    """Number of pictures in a forward pass on each rank. Lower it where evaluation does not fit into memory beside the
    training."""


class CheckpointSection(Section):
    """When the run is saved. Its end, a signal and a file named STOP in the run folder always save it."""

    every_steps: Positive | None = None
    """Number of steps between two saves. None are made by steps when it is absent. `evatool plan` suggests a number."""
    every_minutes: PositiveFloat | None = None
    """Minutes between two saves, beside those by steps. None are made by time when it is absent."""
    keep: Positive = 2
    """Number of newest checkpoints that stay on the disk; older ones are deleted."""
    keep_every_steps: Positive | None = None
    """Checkpoints at multiples of this number of steps are kept for good. It must be a multiple of `every_steps`; none
    are kept when it is absent."""

    @model_validator(mode="after")
    def _kept_ones_are_saved(self) -> CheckpointSection:
        kept, saved = self.keep_every_steps, self.every_steps
        if kept is not None and (saved is None or kept % saved):
            raise ValueError(
                f"keep_every_steps = {kept} keeps nothing: no save falls on its multiples; make it a multiple of "
                f"every_steps, which is {'absent' if saved is None else saved}"
            )
        return self
