"""Weights of a loss's parts that change over the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from evatool.core.batch import LossDict
from evatool.train.hooks.base import Hook
from evatool.train.state import TrainState

if TYPE_CHECKING:
    from evatool.train.trainer import Trainer


class Weighted(Protocol):
    """An objective whose parts have weights by samples seen."""

    weights: dict[str, float]

    def set_samples_seen(self, samples_seen: int) -> None:
        """Move `weights` on."""
        ...


class LossWeights(Hook):
    """Sets an objective's weights before each step by the samples seen until then, and records those of logged steps.

    Args:
        objective: whose weights they are.
        recorded: names of the weights that change; only they are recorded, as `train/weight/NAME`.
    """

    def __init__(self, objective: Weighted, recorded: frozenset[str]) -> None:
        self._objective, self._recorded = objective, recorded

    def at_start(self, trainer: Trainer) -> None:
        self._objective.set_samples_seen(trainer.state.samples_seen)

    def after_step(self, state: TrainState, losses: LossDict, trainer: Trainer) -> None:
        if trainer.is_log_step:  # of the step just done
            weights = self._objective.weights
            trainer.record |= {f"train/weight/{name}": weights[name] for name in sorted(self._recorded)}
        self._objective.set_samples_seen(state.samples_seen)

    def on_rollback(self, trainer: Trainer) -> None:
        self._objective.set_samples_seen(trainer.state.samples_seen)
