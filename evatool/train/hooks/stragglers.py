"""Names a rank that the others wait for."""

from __future__ import annotations

import logging
import platform
import statistics

from evatool.distributed.collectives import gather_objects, rank, world_size
from evatool.train.control import StepResult, TrainerControl
from evatool.train.hooks.base import Hook

log = logging.getLogger(__name__)


class Stragglers(Hook):
    """Compares, on logging steps and every 25th, how long each rank was busy by itself, and logs one that is slower.

    Compared are the wait for data, and the time to the end of the backward pass less what the rank spends in the
    exchanges of this package. Where an engine exchanges weights or gradients within those passes (fsdp2, ZeRO-3, and
    in the backward pass all of them), the ranks wait there for the slowest, so that mostly the first tells.

    Args:
        factor, least_sec: a rank is slow from this multiple of the median on, if it also is this much slower a step.
    Test: tests/dist/test_stragglers.py (docs/faults.md#r16).
    """

    every = 25

    def __init__(self, factor: float = 1.5, least_sec: float = 0.05) -> None:
        self._factor, self._least_sec = factor, least_sec
        self._busy_sec, self._data_wait_sec, self._num_steps = 0.0, 0.0, 0  # since the last comparison

    def after_step(self, result: StepResult, trainer: TrainerControl) -> None:
        self._busy_sec += result.busy_sec
        self._data_wait_sec += result.data_wait_sec
        self._num_steps += 1
        if world_size() == 1 or not (result.is_logged or result.step % self.every == 0):
            return
        means = self._busy_sec / self._num_steps, self._data_wait_sec / self._num_steps
        self._busy_sec, self._data_wait_sec, self._num_steps = 0.0, 0.0, 0
        reports = gather_objects((means, platform.node()))
        if rank() == 0:
            hosts = [host for _, host in reports]
            if not self._compare(result.step, [busy for (busy, _), _ in reports], hosts):
                self._compare(result.step, [data_wait for (_, data_wait), _ in reports], hosts)

    def _compare(self, step: int, seconds: list[float], hosts: list[str]) -> bool:
        """Name the slow ranks; True if there were any."""
        median = statistics.median_low(seconds)  # of two ranks the faster one
        is_slow = [sec > self._factor * median and sec > median + self._least_sec for sec in seconds]
        for number, (sec, host) in enumerate(zip(seconds, hosts, strict=True)):
            if is_slow[number]:
                log.warning(
                    "rank %d on %s is slow: it was busy for %.0f ms a step, the median rank for %.0f ms (step %d)",
                    number,
                    host,
                    1000 * sec,
                    1000 * median,
                    step,
                )
        return any(is_slow)
