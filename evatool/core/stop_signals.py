"""Ctrl-C and SIGTERM from the first moment of a process to its last: whatever it waits for, it ends. No torch.

| while | the signals |
| --- | --- |
| the command is imported | end the process at once: `end_at_once` |
| it runs | raise KeyboardInterrupt and `Terminated` in the main thread: `raising` |
| ranks wait for each other | the same, and if that is not heard the process ends: `end_if_unheard` |
| a training loop runs | ask it to stop after the step, and to save: `hold` |

Python carries out handlers in the main thread only, between two of its own instructions. A rank that waits for others
in C++ comes to no next instruction, so there a thread is told by the system itself, through a pipe.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from evatool.core.errors import ExitCode

log = logging.getLogger(__name__)

_EXIT_CODES = {signal.SIGINT: ExitCode.INTERRUPTED, signal.SIGTERM: ExitCode.PREEMPTED}
_UNHEARD_SEC = 3.0
"""How long the main thread may take to come to its end by itself."""


class Terminated(BaseException):
    """SIGTERM has reached the process. No `Exception`, as Ctrl-C is none: who catches those and goes on must not go on.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")


class _Arrangement:
    """What is arranged in this process."""

    def __init__(self) -> None:
        self.is_answered = self.is_watched = False
        self.before: dict[signal.Signals, Any] = {}
        self.record: Callable[[int, str], None] | None = None


_process = _Arrangement()


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def end_at_once() -> None:
    """Let both signals end the process on the spot, with their exit codes, until `restore` or another arrangement."""
    if not _is_main_thread() or _process.before:
        return

    def end(number: int, frame: FrameType | None) -> None:
        os._exit(_EXIT_CODES[signal.Signals(number)])

    _process.before = {number: signal.signal(number, end) for number in _EXIT_CODES}


def restore() -> None:
    """Undo `end_at_once`."""
    for number, handler in _process.before.items():
        signal.signal(number, handler)
    _process.before = {}


@contextmanager
def raising() -> Iterator[None]:
    """While entered, the signals raise KeyboardInterrupt and `Terminated`. Only in the main thread."""
    if not _is_main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, stop)}
    if _process.before:  # elsewhere Ctrl-C is the user's own matter
        before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deaf() -> Iterator[None]:
    """While entered, for the last words of a run, the signals do nothing: a launcher sends one to every rank that is
    left. Only in the main thread."""
    if not _is_main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _EXIT_CODES}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def hold(is_answered: bool) -> None:
    """Whether the caller answers the signals itself, so that `end_if_unheard` does nothing."""
    _process.is_answered = is_answered


def record_with(record: Callable[[int, str], None] | None) -> None:
    """Who is given exit code and message before this process is ended from a thread; None: nobody."""
    _process.record = record


def end_if_unheard() -> None:
    """From now on a signal ends this process even where its main thread waits in C++: some seconds later."""
    if _process.is_watched or not _is_main_thread():
        return
    _process.is_watched = True
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # What is said to a loader process is not said to this one.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=_watch, args=(reading,), name="signal watch", daemon=True).start()


def _watch(reading: int) -> None:
    while True:
        number = next((number for number in os.read(reading, 64) if number in _EXIT_CODES), None)
        if number is None or _process.is_answered:
            continue
        time.sleep(_UNHEARD_SEC)
        if not _process.is_answered:
            name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            end_process(_EXIT_CODES[signal.Signals(number)], f"stopped by {name} while it waited for other ranks")


def is_cut_off(error: BaseException) -> bool:
    """True for what a signal has raised, and for what was made of it."""
    return any(isinstance(each, KeyboardInterrupt | Terminated) for each in (error, error.__cause__))


def leave_at_once(exit_code: int) -> None:
    """End this process without Python's tidying, which takes seconds of a busy machine once torch is loaded."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def end_process(exit_code: int, message: str) -> None:
    """End this process from any thread, whatever its main thread does; the message is logged and recorded first."""
    try:
        log.error("%s", message)
        if _process.record is not None:
            _process.record(int(exit_code), message)
    finally:
        os._exit(int(exit_code))
