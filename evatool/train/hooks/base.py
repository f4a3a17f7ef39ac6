"""What happens around the loop: log, record, save, watch. Hooks run in the order the stage lists them."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from evatool.core.batch import LossDict
from evatool.distributed.collectives import rank
from evatool.distributed.engines.sharded_state import ShardedState
from evatool.train.state import SavedRun, TrainState

if TYPE_CHECKING:
    from evatool.train.trainer import Trainer

log = logging.getLogger(__name__)


class Hook:
    """Something done around the loop, on every rank; a hook overrides what it needs."""

    def at_start(self, trainer: Trainer) -> None:
        """Before the first step of this attempt."""

    def before_update(self, trainer: Trainer) -> None:
        """In every step, once the gradients are there and nothing has changed yet."""

    def after_step(self, state: TrainState, losses: LossDict, trainer: Trainer) -> None:
        """After every step. `losses` are this rank's, on the device: fetching one makes a GPU wait.

        The same figures as numbers, means over ranks, are in `trainer.record` when `trainer.is_log_step`.
        """

    def on_save(self, trainer: Trainer) -> None:
        """When a checkpoint is due by the clock."""

    def on_stop(self, trainer: Trainer) -> None:
        """When a signal or a STOP file ends the run early."""

    def on_rollback(self, trainer: Trainer) -> None:
        """When the run has gone back to a checkpoint, whose step is `trainer.state.step`."""

    def held(self, trainer: Trainer) -> ShardedState | None:
        """Tensors of this hook that a checkpoint keeps, under names of their own."""
        return None

    def load(self, saved: SavedRun, trainer: Trainer) -> None:
        """Take back what `held` gave, from a checkpoint that the run goes back to."""

    def at_end(self, trainer: Trainer) -> None:
        """After the last step."""

    def close(self) -> None:
        """Always, even after an error in another hook."""


class ConsoleLog(Hook):
    """One log line per record, and a progress bar on a terminal.

    Args:
        description: what the bar is called, for instance "train-clip".
    """

    def __init__(self, description: str) -> None:
        self._description = description
        self._stack = ExitStack()
        self._bar: Any = None
        self._start, self._start_step = 0.0, 0

    def at_start(self, trainer: Trainer) -> None:
        from evatool.core.progress import progress

        state = trainer.state
        self._start, self._start_step = time.perf_counter(), state.step
        if rank() == 0:
            total, done = (steps * trainer.global_batch_size for steps in (trainer.num_steps, state.step))
            self._bar = self._stack.enter_context(progress(self._description, total, unit="samples", initial=done))

    def on_rollback(self, trainer: Trainer) -> None:
        self._start, self._start_step = time.perf_counter(), trainer.state.step

    def after_step(self, state: TrainState, losses: LossDict, trainer: Trainer) -> None:
        if rank() != 0:
            return
        fields = {"loss": f"{trainer.record['train/loss']:.4f}"} if trainer.record else {}
        self._bar.advance(trainer.global_batch_size, **fields)
        if trainer.is_log_step:
            log.info("%s", self._line(trainer))

    def _line(self, trainer: Trainer) -> str:
        record, step = trainer.record, trainer.state.step
        per_step_sec = (time.perf_counter() - self._start) / max(1, step - self._start_step)
        eta = timedelta(seconds=round((trainer.num_steps - step) * per_step_sec))
        mfu = f"  MFU {record['throughput/mfu']:.0%}" if "throughput/mfu" in record else ""
        lrs = [f"{value:.2e}" for key, value in record.items() if key.startswith("optim/lr/")]
        return (
            f"step {step}/{trainer.num_steps}  loss {record['train/loss']:.4f}  lr {' '.join(lrs)}"
            f"  grad {record['optim/grad_norm']:.3g}  {record['throughput/samples_per_sec']:.0f} samples/s"
            f"{mfu}  data wait {record['throughput/data_wait_fraction']:.0%}"
            f"  {record['memory/peak_bytes'] / 2**30:.1f} GiB  ETA {eta}"
        )

    def close(self) -> None:
        self._stack.close()


class MetricsFile(Hook):
    """Every record as one line of JSON; values that are not finite become null.

    Opened again by a resumed run, lines of steps that the checkpoint does not have are dropped first, so each step
    stands once.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def on_rollback(self, trainer: Trainer) -> None:
        self.close()
        self.at_start(trainer)

    def at_start(self, trainer: Trainer) -> None:
        if rank() != 0:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            kept = [r for r in read_metrics(self._path) if r["step"] <= trainer.state.step]
            shorter = self._path.with_name(f".{self._path.name}.tmp")
            shorter.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
            os.replace(shorter, self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def after_step(self, state: TrainState, losses: LossDict, trainer: Trainer) -> None:
        if self._file is not None and trainer.is_log_step:
            finite = {key: value if math.isfinite(value) else None for key, value in trainer.record.items()}
            self._file.write(json.dumps(finite) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class StatusFile(Hook):
    """Keeps the run's status true to the step that was logged last.

    Args:
        refresh: writes it; called on rank 0 after the metrics of a step are on the disk, once a second at most.
    """

    def __init__(self, refresh: Callable[[], None]) -> None:
        self._refresh, self._last = refresh, -math.inf

    def after_step(self, state: TrainState, losses: LossDict, trainer: Trainer) -> None:
        now = time.monotonic()
        if rank() == 0 and trainer.is_log_step and now - self._last >= 1:
            self._last = now
            self._refresh()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that was cut short by a crash is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            log.warning("%s: a damaged line was left out", path)
            continue
        records.append(record)
    return records
