"""Checkpoints while a run trains: copied to main memory between two steps, written by a thread beside those after."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evatool.core.errors import CheckpointError, TransientError
from evatool.distributed.collectives import side_group
from evatool.distributed.engines.sharded_state import ShardedState, StateShard
from evatool.train.control import RunSnapshot, StepResult, TrainerControl
from evatool.train.hooks.base import Hook

log = logging.getLogger(__name__)


class HostCopy:
    """A rank's part of a state in main memory, which training does not change. The memory serves every save anew.

    Of tensors on a GPU it is page-locked: copies run at full speed, and getting such memory takes longer than a copy.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def take(self, state: ShardedState) -> ShardedState:
        """The state as it is now, on the CPU."""
        copied = ShardedState(dict(state.shapes), dict(state.dtypes))
        for piece in state.pieces:
            key, live = (piece.name, piece.start), piece.values
            buffer = self._buffers.get(key)
            if buffer is None or buffer.shape != live.shape:
                buffer = torch.empty(live.shape, dtype=live.dtype, pin_memory=live.is_cuda)
                self._buffers[key] = buffer
            buffer.copy_(live, non_blocking=True)
            copied.pieces.append(StateShard(piece.name, piece.start, buffer))
        if any(piece.values.is_cuda for piece in state.pieces):
            torch.cuda.current_stream().synchronize()
        return copied


class BackgroundWriter:
    """Writes one checkpoint at a time in a thread of its own.

    Ranks agree in their threads, over a group of their own, so nothing is held up by the steps' exchanges.

    Args:
        save: writes a checkpoint and returns its folder; called on every rank, with what `start` was given (states as
            copies) and `group`.
    """

    def __init__(self, save: Callable[..., Path]) -> None:
        self._save = save
        self._model, self._optimizer = HostCopy(), HostCopy()
        self._thread: threading.Thread | None = None
        self._path: Path | None = None
        self._error: BaseException | None = None
        self._group: Any = None

    def start(self, snapshot: RunSnapshot) -> None:
        """Copy the states and begin to write; every rank must call it, none before its `wait` for the one before."""
        assert self._thread is None, "one at a time"
        if self._group is None:
            self._group = side_group()
        values = {
            "step": snapshot.step,
            "objective_state": self._model.take(snapshot.objective_state),
            "optimizer_state": self._optimizer.take(snapshot.optimizer_state),
            "groups": snapshot.groups,
            "train_state": snapshot.train_state,
        }
        self._path = self._error = None
        # A daemon, so that it cannot keep a process that is to end at once: half-written folders never look whole.
        self._thread = threading.Thread(target=self._write, args=(values,), name="checkpoint writer", daemon=True)
        self._thread.start()

    def _write(self, values: dict[str, Any]) -> None:
        try:
            self._path = self._save(**values, group=self._group)
        except BaseException as error:  # raised again by `wait`
            self._error = error

    @property
    def has_failed(self) -> bool:
        """True once the save under way has ended with an error; another rank may see that a moment later."""
        return self._error is not None

    def wait(self) -> Path | None:
        """What `save` returned for the checkpoint under way, or raises what it raised; None where none is under way."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error
        return self._path


MAX_FAILED_SAVES = 3


class Checkpoints(Hook):
    """Saves every `every_steps` steps, when the clock asks for it, when the run is stopped, and at its end.

    Training waits for a copy of the states only; a save that is due while another is under way waits for that one. A
    stop, the end of a run and a rollback wait until all is on the disk.

    Args:
        save: writes a checkpoint (`checkpoint.save.save_run` with the run's own values bound); called on every rank, in
            a thread, with step, objective_state, optimizer_state (as held there), groups, train_state and group.
        every_steps: steps between two saves; only clock, stop and end when None.
    A save that fails on any rank (a full disk) is a warning, and another is made as soon as that is known: earlier
    checkpoints are intact.

    Raises: TransientError (exit code 76), on every rank, after `MAX_FAILED_SAVES` in a row, and where the last save of
        a run fails.
    """

    def __init__(self, save: Callable[..., Path], every_steps: int | None = None) -> None:
        self._writer, self._every_steps = BackgroundWriter(save), every_steps
        self._failures = 0  # in a row
        self._begun_step: int | None = None
        self._saved_step: int | None = None

    def at_start(self, trainer: TrainerControl) -> None:
        self._begun_step = self._saved_step = trainer.state.step if trainer.state.step else None

    def on_rollback(self, trainer: TrainerControl) -> None:
        self.at_start(trainer)

    def after_step(self, result: StepResult, trainer: TrainerControl) -> None:
        is_due = self._every_steps is not None and result.step % self._every_steps == 0
        if trainer.is_rolling_back:  # it goes back to a checkpoint from before the steps that were skipped
            self._settle()
        elif is_due and result.step < trainer.config.num_steps:
            self._begin(trainer)
        elif self._writer.has_failed:
            trainer.request_save()  # all ranks then save after the same step, whichever saw the failure first

    def on_save(self, trainer: TrainerControl) -> None:
        self._begin(trainer)

    def on_stop(self, trainer: TrainerControl) -> None:
        self._write_last(trainer)

    def at_end(self, trainer: TrainerControl) -> None:
        self._write_last(trainer)

    def close(self) -> None:
        try:
            self._writer.wait()
        except Exception as error:  # the run ends with an error of its own
            log.warning("the last save failed: %s", error)

    def _begin(self, trainer: TrainerControl) -> None:
        if self._begun_step == trainer.state.step:
            return
        self._settle()
        self._writer.start(trainer.snapshot())
        self._begun_step = trainer.state.step

    def _settle(self) -> None:
        """Wait for the save under way; its failure is a warning, until there were too many."""
        try:
            self._conclude()
        except CheckpointError as error:  # the same on every rank
            self._failures += 1
            if self._failures >= MAX_FAILED_SAVES:
                raise _transient(error, f"{self._failures} saves in a row failed; the last: {error.what}") from error
            log.warning("training goes on, and the state is saved again: %s", error)

    def _conclude(self) -> None:
        begun, self._begun_step = self._begun_step, self._saved_step
        if self._writer.wait() is not None:
            self._begun_step = self._saved_step = begun
            self._failures = 0

    def _write_last(self, trainer: TrainerControl) -> None:
        try:
            self._conclude()
        except CheckpointError as error:
            log.warning("the state is saved again: %s", error)
        self._begin(trainer)
        try:
            self._conclude()
        except CheckpointError as error:
            raise _transient(error, error.what) from error


def _transient(error: CheckpointError, what: str) -> TransientError:
    return TransientError(what, where=error.where, expected=error.expected, fix=error.fix)
