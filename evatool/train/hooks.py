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

from evatool.distributed.collectives import rank
from evatool.distributed.held import HeldState
from evatool.errors import CheckpointError, TransientError
from evatool.train.state import SavedRun, TrainState, describe_groups
from evatool.types import LossDict

if TYPE_CHECKING:
    from evatool.train.trainer import Trainer

log = logging.getLogger(__name__)


class Hook:
    """Something done around the loop, on every rank; a hook overrides what it needs."""

    def at_start(self, trainer: Trainer) -> None:
        """Before the first step of this attempt."""

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

    def held(self, trainer: Trainer) -> HeldState | None:
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
        from evatool.progress import progress

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


MAX_FAILED_SAVES = 3


class Checkpoints(Hook):
    """Saves every `every_steps` steps, when the clock asks for it, when the run is stopped, and at its end.

    Args:
        save: writes a checkpoint (`checkpoint.save.save_run` with the run's own values bound); called on every rank
            with step, objective_state, optimizer_state (as held there), groups and train_state.
        every_steps: steps between two saves; only clock, stop and end when None.
    A save that fails on any rank (a full disk) is a warning, and is tried again after the next step: earlier
    checkpoints are intact.

    Raises: TransientError (exit code 76), on every rank, after `MAX_FAILED_SAVES` in a row; CheckpointError where the
        last save of a run fails.
    """

    def __init__(self, save: Callable[..., Path], every_steps: int | None = None) -> None:
        self._save, self._every_steps = save, every_steps
        self._failures = 0  # in a row
        self._saved_step: int | None = None
        self.latest: Path | None = None

    def at_start(self, trainer: Trainer) -> None:
        self._saved_step = trainer.state.step if trainer.state.step else None

    on_rollback = at_start

    def after_step(self, state: TrainState, losses: LossDict, trainer: Trainer) -> None:
        # Not while a rollback is due: it goes back to a checkpoint from before the steps that were skipped.
        is_due = self._every_steps is not None and state.step % self._every_steps == 0
        if (is_due or self._failures) and state.step < trainer.num_steps and not trainer.rollback_reason:
            self._try_to_write(trainer)

    def on_save(self, trainer: Trainer) -> None:
        self._try_to_write(trainer)

    def on_stop(self, trainer: Trainer) -> None:
        self._write(trainer)

    def at_end(self, trainer: Trainer) -> None:
        self._write(trainer)

    def _try_to_write(self, trainer: Trainer) -> None:
        try:
            self._write(trainer)
        except CheckpointError as error:  # the same on every rank
            self._failures += 1
            if self._failures >= MAX_FAILED_SAVES:
                raise TransientError(
                    f"{self._failures} saves in a row failed; the last: {error.what}",
                    where=error.where,
                    expected=error.expected,
                    fix=error.fix,
                ) from error
            log.warning("training goes on, and the save is tried again after the next step: %s", error)
        else:
            self._failures = 0

    def _write(self, trainer: Trainer) -> None:
        state, engine = trainer.state, trainer.engine
        if self._saved_step == state.step:
            return
        objective_state = engine.held_model()
        for hook in trainer.hooks:
            held = hook.held(trainer)
            objective_state = objective_state if held is None else objective_state.merged(held)
        self.latest = self._save(
            step=state.step,
            objective_state=objective_state,
            optimizer_state=engine.held_optimizer(),
            groups=describe_groups(trainer.groups),
            train_state=trainer.saved_state(),
        )
        self._saved_step = state.step
