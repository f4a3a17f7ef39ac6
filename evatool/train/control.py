"""What hooks see of a run while it trains, and what they may ask of it; the trainer is one implementation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from evatool.core.batch import Batch, LossDict
from evatool.core.step import StepContext
from evatool.distributed.engines.base import Engine
from evatool.distributed.engines.sharded_state import ShardedState
from evatool.objective.base import Objective
from evatool.train.state import TrainState


@dataclass(frozen=True)
class TrainerConfig:
    """The plain values of a training loop."""

    num_steps: int
    """Optimiser steps of the whole run, those before a resume too."""
    global_batch_size: int
    """Samples of a step over all ranks."""
    log_every: int = 10
    """Steps between two readings of the metrics. Losses are fetched only then: a fetch makes a GPU wait."""
    micro_batch_size: int | None = None
    """Samples of a rank that go through the model at once; all of its batch when None."""
    seed: int = 0
    """Seed of a run that begins; one that goes on has its seed in its `TrainState`."""
    stop_file: Path | None = None
    """Its appearing stops the run after a step and a save; it is removed then, so that the run can be resumed."""
    save_every_sec: float | None = None
    """Seconds after which a checkpoint is due by rank 0's clock; none is due by the clock when None."""

    def is_logged(self, step: int) -> bool:
        """True for the first step, the last and every `log_every`-th, counted from 1."""
        return step % self.log_every == 0 or step == 1 or step == self.num_steps


@dataclass(frozen=True)
class StepResult:
    """One optimiser step that has been made, as the hooks see it on each rank."""

    context: StepContext
    """Where the run stood before the step, as the objective was told."""
    step: int
    """Optimiser steps done, this one and skipped ones included; the number in metrics and checkpoints."""
    samples_seen: int
    """Samples of the whole job seen, those of this step included."""
    losses: LossDict
    """This rank's losses, detached, on the device: fetching one makes a GPU wait."""
    batch: Batch
    """This rank's samples, as the loader made them."""
    grad_norm: Tensor
    """The gradient norm before clipping, the same on every rank; not finite if the step was skipped."""
    is_spike: Tensor | None
    """bool (): the loss was kept from the weights as a spike; None where no spikes are looked for."""
    busy_sec: float
    """Seconds from the wait for data to the end of the backward pass, less those in exchanges of this package."""
    data_wait_sec: float
    """Seconds of waiting for the batch."""
    is_logged: bool
    """True where `metrics` were read, and are written."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Losses as means over ranks, gradient norms, learning rates, throughput; empty on steps that are not logged."""

    def add_metrics(self, metrics: dict[str, float]) -> None:
        """Put more values beside those of this step, for the hooks listed after the caller to write.

        Nothing is written on a step that is not logged.
        """
        self.metrics.update(metrics)


@dataclass(frozen=True)
class RunSnapshot:
    """Everything that a checkpoint keeps, as it is at one step; the tensors are live and change with the next."""

    step: int
    objective_state: ShardedState
    """Weights and buffers of the objective, and the tensors of hooks."""
    optimizer_state: ShardedState
    groups: list[dict[str, Any]]
    """The parameter groups as plain values."""
    train_state: dict[str, Any]
    """The `TrainState` as plain values."""


class TrainerControl(ABC):
    """The trainer as a hook knows it: values to read, and requests.

    Requests are carried out after the hooks of the step have all been called, in this order: a rollback, a stop, a
    save. Nothing else of a trainer is changed from outside.

    Attributes:
        config: length, batch size and policies of the loop.
        state: how far the run has come. Hooks change it by its own methods only.
        objective: the module that is trained, inside `engine`.
        engine: carries out the steps, and gives access to weights and moments.
    """

    config: TrainerConfig
    state: TrainState
    objective: Objective
    engine: Engine

    @property
    @abstractmethod
    def can_roll_back(self) -> bool:
        """True where the run keeps checkpoints that it could go back to."""

    @property
    @abstractmethod
    def is_rolling_back(self) -> bool:
        """True once a rollback was requested in this step."""

    @abstractmethod
    def request_save(self) -> None:
        """Have the hooks of all ranks save after a step soon, the same step on every rank; one rank may ask alone."""

    @abstractmethod
    def request_stop(self, reason: str) -> None:
        """Save and end this run after a step soon, resumable, as a SIGTERM would; one rank may ask alone.

        Args:
            reason: completes "stopped by ..." in the message of this rank.
        """

    @abstractmethod
    def request_end(self) -> None:
        """End the run after a step soon as one that is complete, for instance since it no longer improves; one rank may
        ask alone."""

    @abstractmethod
    def request_rollback(self, reason: str, where: str = "") -> None:
        """Go back to the last checkpoint after this step, and on behind the samples met since; all ranks ask together.

        Args:
            reason: what went wrong, as a clause.
            where: its step, ranks and sample keys; this step when absent.
        """

    @abstractmethod
    def snapshot(self) -> RunSnapshot:
        """What a checkpoint of this moment consists of; every rank must call it."""
