"""Requests to stop, agreed between ranks so that all stop after the same step."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from evatool.distributed.collectives import all_reduce_max, world_size

log = logging.getLogger(__name__)

REASONS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
if hasattr(signal, "SIGUSR1"):  # not on Windows
    REASONS[signal.SIGUSR1] = "SIGUSR1"
_NAMES = [None, *REASONS.values()]


class StopRequests:
    """While entered, the first Ctrl-C, SIGTERM or SIGUSR1 asks for a stop after the step; a second Ctrl-C is not held.

    Signal handlers belong to the main thread: entered elsewhere, this catches nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reason: str | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._pending: Tensor | None = None

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in REASONS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        reason = REASONS[signal.Signals(number)]
        if reason == "Ctrl-C" and self._reason is not None:
            raise KeyboardInterrupt
        if self._reason is None:
            again = "; press again to stop at once, without saving" if reason == "Ctrl-C" else ""
            log.warning("%s: stopping after this step and saving%s", reason, again)
        self._reason = self._reason or reason

    def agreed(self) -> str | None:
        """Why to stop now, the same answer on every rank, or None; every rank must call it after every step."""
        if world_size() == 1:
            return self._reason
        code = _NAMES.index(self._reason)
        flag = all_reduce_max(torch.tensor([code], dtype=torch.int32, device=self._device))
        if self._device.type != "cpu":
            # Read the flags of the step before: they have arrived, so the CPU does not wait for this step's work.
            flag, self._pending = self._pending if self._pending is not None else torch.zeros_like(flag), flag
        return _NAMES[int(flag)]
