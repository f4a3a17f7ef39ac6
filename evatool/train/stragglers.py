"""Names a rank that the others wait for."""

from __future__ import annotations

import logging
import platform
import statistics
from typing import TYPE_CHECKING

from evatool.distributed.collectives import gather_objects, rank, world_size
from evatool.train.hooks import Hook
from evatool.train.state import TrainState
from evatool.types import LossDict

if TYPE_CHECKING:
    from evatool.train.trainer import Trainer

log = logging.getLogger(__name__)


class Stragglers(Hook):
    """Compares, on logging steps and every 25th, how long each rank was busy by itself, and logs one that is slower.

    Busy is the time a step takes less what the rank spends in the exchanges between ranks of this package: waiting for
    data, and whatever delays the process before and within the forward pass. Where an engine gathers weights within
    the forward pass (fsdp2, ZeRO-3), all ranks wait there for the slowest, and only delays outside of it tell.

    Args:
        factor, least_sec: a rank is slow from this multiple of the median on, if it also is this much slower a step.
    Test: tests/dist/test_stragglers.py (scale.md 5.2, R16).
    """

    every = 25

    def __init__(self, factor: float = 1.5, least_sec: float = 0.005) -> None:
        self._factor, self._least_sec = factor, least_sec

    def after_step(self, state: TrainState, losses: LossDict, trainer: Trainer) -> None:
        if world_size() == 1 or not (trainer.is_log_step or state.step % self.every == 0):
            return
        busy = trainer.read_busy_sec()
        reports = gather_objects((busy, platform.node()))
        median = statistics.median(sec for sec, _ in reports)
        for number, (sec, host) in enumerate(reports):
            if rank() == 0 and sec > self._factor * median and sec > median + self._least_sec:
                log.warning(
                    "rank %d on %s is slow: it was busy for %.0f ms a step, the median rank for %.0f ms (step %d)",
                    number,
                    host,
                    1000 * sec,
                    1000 * median,
                    state.step,
                )
