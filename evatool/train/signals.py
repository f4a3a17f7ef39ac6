"""Requests to stop, agreed between ranks so that all stop after the same step."""

from __future__ import annotations

import logging
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from evatool.distributed.collectives import all_reduce_max, rank, world_size

log = logging.getLogger(__name__)

REASONS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
if hasattr(signal, "SIGUSR1"):  # not on Windows
    REASONS[signal.SIGUSR1] = "SIGUSR1"
SAVE, END, HOOK, STOP_FILE = "save", "end", "a hook of another rank", "the STOP file"
# The largest wins where ranks differ: a stop is more than a save.
_NAMES = [None, SAVE, END, HOOK, STOP_FILE, *REASONS.values()]


class StopRequests:
    """While entered, the first Ctrl-C, SIGTERM or SIGUSR1 asks for a stop after the step; a second Ctrl-C is not held.

    Signal handlers belong to the main thread: entered elsewhere, this catches none. Rank 0 also looks for a file and
    at the clock.

    Args:
        stop_file: its appearing asks for a stop; it is removed then, so that the run can be resumed.
        save_every_sec: asks for a checkpoint this long after the start or the one before, by rank 0's clock.
    """

    def __init__(
        self, device: torch.device, *, stop_file: Path | None = None, save_every_sec: float | None = None
    ) -> None:
        self._device, self._stop_file, self._save_every_sec = device, stop_file, save_every_sec
        self._reason: str | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._pending: Tensor | None = None
        self._last_save = time.monotonic()
        self._wants_save = self._wants_end = False  # of this rank's hooks
        self._hook_reason: str | None = None

    def __enter__(self) -> StopRequests:
        self._last_save = time.monotonic()
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

    def request_save(self) -> None:
        """Have all ranks save after a step soon; one rank may ask alone."""
        self._wants_save = True

    def request_end(self) -> None:
        """Have all ranks end the run after a step soon; one rank may ask alone."""
        self._wants_end = True

    def request_stop(self, reason: str) -> None:
        """Have all ranks stop after a step soon, resumable; one rank may ask alone, and its first reason counts."""
        self._hook_reason = self._hook_reason or reason

    def reason_of(self, asked: str) -> str:
        """What `agreed` has returned, in words for a message."""
        return self._hook_reason or asked if asked == HOOK else asked

    def agreed(self) -> str | None:
        """What is asked for now, the same answer on every rank, or None; every rank must call it after every step.

        Returns: `SAVE`, `END`, or why to stop.
        """
        asked = self._asked()
        if world_size() == 1:
            return asked
        flag = all_reduce_max(torch.tensor([_NAMES.index(asked)], dtype=torch.int32, device=self._device))
        if self._device.type != "cpu":
            # Read the flags of the step before: they have arrived, so the CPU does not wait for this step's work.
            flag, self._pending = self._pending if self._pending is not None else torch.zeros_like(flag), flag
        return _NAMES[int(flag)]

    def _asked(self) -> str | None:
        if self._reason is not None:
            return self._reason
        if self._hook_reason is not None:
            return HOOK
        asked = END if self._wants_end else SAVE if self._wants_save else None
        self._wants_save = False
        if rank() != 0:
            return asked
        if self._stop_file is not None and self._stop_file.exists():
            self._stop_file.unlink(missing_ok=True)
            log.warning("%s is there: stopping after this step and saving", self._stop_file)
            self._reason = STOP_FILE
            return self._reason
        now = time.monotonic()
        if self._save_every_sec is not None and now - self._last_save >= self._save_every_sec:
            self._last_save = now
            return asked or SAVE
        return asked
