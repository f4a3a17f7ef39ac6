"""Progress bars on a terminal, silence elsewhere. One live display at a time: an inner bar joins the outer one's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from evatool.core import logging as log
from evatool.core.shown_text import shown

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_active: Progress | None = None
_MIN_INTERVAL_SEC = 0.05  # rich redraws ten times a second; telling it more often only costs time


class ProgressBar:
    """Handle of one bar. Every method is cheap and does nothing where no bar is shown."""

    def __init__(self, display: Progress | None = None, task: TaskID | None = None, initial: float = 0) -> None:
        self._display, self._task = display, task
        self._completed = float(initial)
        self._fields: dict[str, Any] = {}
        self._last_update = 0.0

    def advance(self, n: float = 1, **fields: Any) -> None:
        """Count `n` more units as done; `fields` such as loss=1.23 are shown after the rate until replaced."""
        self._completed += n
        self._fields |= fields
        now = time.monotonic()
        if self._display is not None and now - self._last_update >= _MIN_INTERVAL_SEC:
            self._last_update = now
            self._flush()

    def _flush(self) -> None:
        if self._display is not None and self._task is not None:
            shown = "  ".join(f"{name} {_short(value)}" for name, value in self._fields.items())
            self._display.update(self._task, completed=self._completed, extra=shown)


@contextmanager
def progress(description: str, total: float | None, unit: str = "samples", initial: float = 0) -> Iterator[ProgressBar]:
    """A bar with ETA and rate on rank 0's terminal (stderr); a bar that does nothing otherwise.

    Args:
        total: units of the whole job, None if unknown.
        unit: what is counted, shown in the rate.
        initial: units already done, as after a resume; they do not count towards the rate.
    """
    global _active
    if log.env_rank() != 0 or not log.stderr_console().is_terminal:
        yield ProgressBar()
        return
    outer, display = _active, _active or _new_display()
    if outer is None:
        _active = display
        display.start()
    task = display.add_task(shown(description), total=total, completed=int(initial), unit=unit, extra="")
    bar = ProgressBar(display, task, initial)
    try:
        yield bar
    finally:
        bar._flush()
        if outer is None:
            _active = None
            display.stop()
        else:
            display.remove_task(task)


def _new_display() -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{_short(speed)} {task.fields['unit']}/s" if speed else "", style="progress.data.speed")

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[extra]}", style="dim", markup=False),
        console=log.stderr_console(),
    )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else shown(str(value))
