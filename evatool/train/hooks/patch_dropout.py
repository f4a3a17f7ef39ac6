"""FLIP's patch dropout by a schedule, for instance off for the last part of training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from evatool.train.control import StepResult, TrainerControl
from evatool.train.hooks.base import Hook
from evatool.train.state import TrainState

log = logging.getLogger(__name__)


class PatchDropoutSchedule(Hook):
    """Sets the share of patches that is dropped, by samples seen.

    Args:
        modules: timm's patch dropout modules, whose `prob` is the share.
        first: share from the start on.
        changes: (samples seen, share from there on), rising.
    Source: FLIP (arXiv 2212.00794): unmasked tuning at the end closes most of the gap to training without dropout.
    """

    def __init__(self, modules: Sequence[nn.Module], first: float, changes: Sequence[tuple[int, float]]) -> None:
        self._modules, self._shares = modules, [(0, first), *changes]

    def at_start(self, trainer: TrainerControl) -> None:
        self._set(trainer.state)

    def after_step(self, result: StepResult, trainer: TrainerControl) -> None:
        self._set(trainer.state)

    def on_rollback(self, trainer: TrainerControl) -> None:
        self._set(trainer.state)

    def _set(self, state: TrainState) -> None:
        share = [share for start, share in self._shares if state.samples_seen >= start][-1]
        for module in self._modules:
            dropout: Any = module
            if dropout.prob != share:
                log.info("patch dropout is %g from step %d on", share, state.step + 1)
                dropout.prob = share
