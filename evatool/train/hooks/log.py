"""Hooks that tell how a run goes: on the console, in `metrics.jsonl` and in `status.json`."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

from evatool.core.atomic_io import write_text_atomically
from evatool.core.disk import LineFile
from evatool.core.progress import ProgressBar, progress
from evatool.distributed.collectives import rank
from evatool.train.control import StepResult, TrainerControl
from evatool.train.hooks.base import Hook

log = logging.getLogger(__name__)


class ConsoleLog(Hook):
    """Logs one line for each logged step, and shows a progress bar on a terminal.

    Args:
        description: what the bar is called, for instance "train-clip".
    """

    def __init__(self, description: str) -> None:
        self._description = description
        self._stack = ExitStack()
        self._bar = ProgressBar()
        self._loss: float | None = None  # of the step that was logged last
        self._start, self._start_step = 0.0, 0

    def at_start(self, trainer: TrainerControl) -> None:
        state = trainer.state
        self._start, self._start_step = time.perf_counter(), state.step
        if rank() == 0:
            samples = trainer.config.global_batch_size
            total, done = trainer.config.num_steps * samples, state.step * samples
            self._bar = self._stack.enter_context(progress(self._description, total, unit="samples", initial=done))

    def on_rollback(self, trainer: TrainerControl) -> None:
        self._start, self._start_step = time.perf_counter(), trainer.state.step

    def after_step(self, result: StepResult, trainer: TrainerControl) -> None:
        if rank() != 0:
            return
        self._loss = result.metrics["train/loss"] if result.is_logged else self._loss
        fields = {} if self._loss is None else {"loss": f"{self._loss:.4f}"}
        self._bar.advance(trainer.config.global_batch_size, **fields)
        if result.is_logged:
            log.info("%s", self._line(result, trainer.config.num_steps))

    def _line(self, result: StepResult, num_steps: int) -> str:
        metrics, step = result.metrics, result.step
        per_step_sec = (time.perf_counter() - self._start) / max(1, step - self._start_step)
        eta = timedelta(seconds=round((num_steps - step) * per_step_sec))
        mfu = f"  MFU {metrics['throughput/mfu']:.0%}" if "throughput/mfu" in metrics else ""
        lrs = [f"{value:.2e}" for key, value in metrics.items() if key.startswith("optim/lr/")]
        return (
            f"step {step}/{num_steps}  loss {metrics['train/loss']:.4f}  lr {' '.join(lrs)}"
            f"  grad {metrics['optim/grad_norm']:.3g}  {metrics['throughput/samples_per_sec']:.0f} samples/s"
            f"{mfu}  data wait {metrics['throughput/data_wait_fraction']:.0%}"
            f"  {metrics['memory/peak_bytes'] / 2**30:.1f} GiB  ETA {eta}"
        )

    def close(self) -> None:
        self._stack.close()


class FolderOwner(Hook):
    """Stands before the hooks that write into the run folder, and makes sure that it is still this run's.

    Args:
        check: called on rank 0 before the first step, after each logged one and after a rollback; raises where another
            run has the folder.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check

    def at_start(self, trainer: TrainerControl) -> None:
        if rank() == 0:
            self._check()

    def on_rollback(self, trainer: TrainerControl) -> None:
        self.at_start(trainer)

    def after_step(self, result: StepResult, trainer: TrainerControl) -> None:
        if rank() == 0 and result.is_logged:
            self._check()


class MetricsFile(Hook):
    """Writes the metrics of each logged step as one line of JSON; values that are not finite become null.

    Opened again by a resumed run, lines of steps that the checkpoint does not have are dropped first, so each step
    stands once. Lines that a full disk does not take are kept and written later.

    Raises: OSError at the end of a run whose last lines still cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: LineFile | None = None

    def on_rollback(self, trainer: TrainerControl) -> None:
        self.close()
        self.at_start(trainer)

    def at_start(self, trainer: TrainerControl) -> None:
        if rank() != 0:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            kept = [r for r in read_metrics(self._path) if r["step"] <= trainer.state.step]
            write_text_atomically(self._path, "".join(json.dumps(r) + "\n" for r in kept))
        self._file = LineFile(self._path)

    def after_step(self, result: StepResult, trainer: TrainerControl) -> None:
        if self._file is not None and result.is_logged:
            finite = {key: value if math.isfinite(value) else None for key, value in result.metrics.items()}
            self._file.append(json.dumps(finite))

    def at_end(self, trainer: TrainerControl) -> None:
        if self._file is not None:
            self._file.settle()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class StatusFile(Hook):
    """Keeps the run's status true to the step that was logged last.

    Args:
        refresh: writes it; called on rank 0 after the metrics of a step are on the disk, once a second at most.
    """

    def __init__(self, refresh: Callable[[], None]) -> None:
        self._refresh, self._last = refresh, -math.inf

    def after_step(self, result: StepResult, trainer: TrainerControl) -> None:
        now = time.monotonic()
        if rank() == 0 and result.is_logged and now - self._last >= 1:
            self._last = now
            self._refresh()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, one dict a step; a line that a crash has cut short or damaged is left out."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            records.append(record | {"step": int(record["step"])})
        except (ValueError, TypeError, KeyError, RecursionError):
            log.warning("%s: a damaged line was left out", path)
    return records
