"""One face for all ways to carry out a training step; stages and trainer never see which one is behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from evatool.core.batch import Batch, LossDict
from evatool.distributed.engines.sharded_state import ShardedState, gather_full_state

Bounds = Mapping[str, tuple[float, float]]
"""Parameter name -> (low, high), held in the optimiser's own copy after every step."""


class Engine(ABC):
    """Forward, backward and optimiser step of an objective over all ranks; every rank calls every method.

    A step is `set_lrs`, `forward`, `backward`, `step`. Gradients are means over ranks. Where the loss or a gradient is
    not finite on any rank, no rank's weights or moments change and `step` returns a norm that is not finite.

    Several backward passes add up before a step: all but the last, each with its forward pass, stand in `no_sync()`.

    States are by parameter name and float32, the same for every engine and world size, so any engine resumes
    another's. `held_*` says what this rank holds of them, without any exchange; `model_state` and `optimizer_state`
    bring the whole together on every rank, for tests and small models.

    Attributes:
        module: the objective, not wrapped; its parameters may be pieces (see `summon_full_weights`).
        device: where it lives.
    """

    module: nn.Module
    device: torch.device

    @abstractmethod
    def forward(self, batch: Batch, **options: Any) -> LossDict:
        """What the objective makes of this rank's batch, which may still be on the CPU.

        Args:
            options: handed to the objective's own `forward` after the batch, as they are.
        """

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Gradients of this rank's loss, added to those of earlier passes since the last step."""

    @abstractmethod
    def no_sync(self) -> AbstractContextManager[None]:
        """Forward and backward passes within it are not the last of the step, so gradients need not be reduced yet.

        Reduced once a step on `single`, `ddp`, `fsdp2` and ZeRO 0 and 1; ZeRO 2 and 3 hold only pieces of gradients and
        reduce after every pass. The result is the same.
        """

    @abstractmethod
    def step(self) -> Tensor:
        """Clip and update; returns the gradient norm before clipping, a scalar tensor, the same on every rank."""

    @abstractmethod
    def set_lrs(self, lrs: Sequence[float]) -> None:
        """Learning rate of each group for the next step, in the order of the groups."""

    @abstractmethod
    def summon_full_weights(self) -> AbstractContextManager[None]:
        """Within it parts of `module` (a tower, the temperature) may be used directly, on every rank alike.

        For evaluation between steps. Weights are read only: what is written to them may be lost.
        """

    @abstractmethod
    def replicated_tensors(self) -> list[Tensor]:
        """Tensors that must be the same, bit for bit, on every rank after a step; none where all is divided."""

    @abstractmethod
    def sharded_tensors(self) -> list[Tensor]:
        """Weights and moments that exist on this rank alone, and that nothing but `step` and loading changes.

        None where every rank holds all of them.
        """

    @abstractmethod
    def sharded_model_state(self) -> ShardedState:
        """Parameters and persistent buffers under the objective's `state_dict()` names; may alias live weights."""

    @abstractmethod
    def sharded_optimizer_state(self) -> ShardedState:
        """`exp_avg.<name>`, `exp_avg_sq.<name>`, `num_updates` and a loss scale's state; may alias live state."""

    def model_state(self) -> dict[str, Tensor]:
        """The whole of `sharded_model_state` on the CPU of every rank; may alias live weights."""
        return gather_full_state(self.sharded_model_state())

    def optimizer_state(self) -> dict[str, Tensor]:
        """The whole of `sharded_optimizer_state` on the CPU of every rank; may alias live state."""
        return gather_full_state(self.sharded_optimizer_state())

    @abstractmethod
    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        """Put a model state back; of one that is read from files, each rank reads only what it holds.

        Raises: CheckpointError on missing or unknown names and other shapes.
        """

    @abstractmethod
    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Put an optimiser state back, likewise. Raises: CheckpointError if it is of another model."""
