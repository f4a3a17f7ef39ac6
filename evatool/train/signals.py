"""Requests to stop, agreed between ranks so that all stop after the same step."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from evatool.core import stop_signals
from evatool.distributed.collectives import all_reduce_max, rank, world_size

log = logging.getLogger(__name__)

REASONS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
if hasattr(signal, "SIGUSR1"):  # not on Windows
    REASONS[signal.SIGUSR1] = "SIGUSR1"
SAVE, END, HOOK, STOP_FILE = "save", "end", "a hook of another rank", "the STOP file"
# The largest wins where ranks differ: a stop is more than a save.
_NAMES = [None, SAVE, END, HOOK, STOP_FILE, *REASONS.values()]


STOP_WAITING_AFTER_SEC = 10.0
"""Seconds after a request to stop that a rank among several goes on waiting for its batch."""


class StopWhileWaiting(BaseException):
    """Raised by a signal's handler where the training process waits for a batch: no step is under way.

    Not an `Exception`, so that nothing that reads data takes it for a sample that cannot be read.
    """


class StopRequests:
    """While entered, the first Ctrl-C, SIGTERM or SIGUSR1 asks for a stop after the step; a second Ctrl-C is not held.

    Signal handlers belong to the main thread: entered elsewhere, this catches none. Rank 0 also looks for a file and
    at the clock. Within `waiting_for_data` a stop does not wait for a step that may never be made.

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
        self._is_waiting = False  # for data
        self._give_up_at: float | None = None
        self._timer: threading.Timer | None = None  # comes back to the handler then

    def __enter__(self) -> StopRequests:
        self._last_save = time.monotonic()
        stop_signals.hold(True)
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in REASONS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        stop_signals.hold(False)

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around the wait for a batch.

        Raises: StopWhileWaiting once a stop is asked for: at once where this is the only rank; else after
            `STOP_WAITING_AFTER_SEC`, since all ranks stop after the same step where they can.
        """
        self._is_waiting = True
        try:
            if self._reason is not None and self._before:
                self._stop_waiting()
            yield
        finally:
            self._is_waiting, self._give_up_at = False, None
            if self._timer is not None:
                self._timer.cancel()

    def _stop_waiting(self) -> None:
        now = time.monotonic()
        if world_size() == 1 or (self._give_up_at is not None and now >= self._give_up_at):
            raise StopWhileWaiting
        if self._give_up_at is None:
            self._give_up_at = now + STOP_WAITING_AFTER_SEC
            main_thread = threading.get_ident()
            self._timer = threading.Timer(
                STOP_WAITING_AFTER_SEC + 0.1, lambda: signal.pthread_kill(main_thread, signal.SIGTERM)
            )
            self._timer.daemon = True
            self._timer.start()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        reason = REASONS[signal.Signals(number)]
        if reason == "Ctrl-C" and self._reason is not None:
            raise KeyboardInterrupt
        if self._reason is None:
            again = "; press again to stop at once, without saving" if reason == "Ctrl-C" else ""
            log.warning("%s: stopping after this step and saving%s", reason, again)
        self._reason = self._reason or reason
        if self._is_waiting:
            self._stop_waiting()

    @property
    def reason(self) -> str | None:
        """The signal that this process was sent, or the STOP file; None while it was asked for nothing."""
        return self._reason

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
