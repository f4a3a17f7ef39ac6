"""Hooks that find a rank that hangs, and weights that differ between ranks that should hold the same."""

from __future__ import annotations

import faulthandler
import logging
import os
import platform
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from evatool.core.errors import ExitCode, UnhealthyNodeError
from evatool.core.step import StepContext
from evatool.distributed import peers
from evatool.distributed.collectives import gather_objects, rank, world_size
from evatool.train.control import StepResult, TrainerControl
from evatool.train.hooks.base import Hook

log = logging.getLogger(__name__)


class HangWatch(Hook):
    """Ends this process with exit code 76 where no step was done for `timeout_sec`, and saves where it was stuck.

    A rank that waits in an exchange for one that never comes cannot be told so: its stacks (of all threads) go to
    `folder/stacks_rank_00000.txt`, and a thread ends the process. So do the other waiting ranks. Where one rank gives
    no sign of life, its process stopped or its machine gone, the others name it.

    Args:
        timeout_sec: longest step, its saves and evaluations included, and the wait for the first batch.
        folder: for the stacks.
        record: writes exit code and message where the run's status is kept.
    """

    def __init__(self, timeout_sec: float, folder: Path, record: Callable[[int, str], None]) -> None:
        self._timeout_sec, self._folder, self._record = timeout_sec, folder, record
        self._last = time.monotonic()  # no wall clock: it may jump
        self._step = 0
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def at_start(self, trainer: TrainerControl) -> None:
        self._last, self._step = time.monotonic(), trainer.state.step
        self._thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)
        self._thread.start()

    def after_step(self, result: StepResult, trainer: TrainerControl) -> None:
        self._last, self._step = time.monotonic(), result.step

    def at_end(self, trainer: TrainerControl) -> None:
        self._closed.set()  # a last evaluation may take its time

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(self._timeout_sec / 10, 5.0)):
            if time.monotonic() - self._last > self._timeout_sec:
                self._end()

    def _end(self) -> None:
        path = self._folder / f"stacks_rank_{rank():05d}.txt"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                file.write(f"after step {self._step}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            message = self._message(path, peers.missing())
            log.error("%s", message.replace("\n", "; "))
            self._record(int(ExitCode.TRANSIENT), message)
        finally:
            os._exit(int(ExitCode.TRANSIENT))  # the main thread may wait in native code for ever

    def _message(self, stacks: Path, missing: list[str]) -> str:
        waits = (
            f"rank {rank()} on {platform.node()} has done no step for {self._timeout_sec:g} s after step {self._step}"
        )
        look = "look at the rank whose stacks are missing or differ, or raise engine.hang_timeout_sec"
        what = f"{waits}: it hangs, or waits for a rank that does"
        if missing:
            what, look = f"{'; '.join(missing)}: {waits}", "look at that rank's machine"
        return f"{what}\nwhere: {stacks}\nnext: run the same command with --resume; if it happens again, {look}"


class ReplicaCheck(Hook):
    """Compares checksums of what all ranks hold alike, every `every_steps` steps: a bit that flipped in one rank's
    memory otherwise spreads unseen.

    Raises: UnhealthyNodeError (exit code 79), on every rank, naming the ranks and machines that differ.
    """

    def __init__(self, every_steps: int = 100) -> None:
        self._every_steps = every_steps

    def after_step(self, result: StepResult, trainer: TrainerControl) -> None:
        if world_size() > 1 and result.step % self._every_steps == 0:
            self._compare(result.step, trainer)

    def _compare(self, step: int, trainer: TrainerControl) -> None:
        replicated_tensors = trainer.engine.replicated_tensors()
        if not replicated_tensors:
            return
        found = gather_objects((checksum(replicated_tensors), platform.node()))
        most = Counter(value for value, _ in found).most_common(1)[0]
        if most[1] == len(found):
            return
        deviating = [f"rank {number} on {node}" for number, (value, node) in enumerate(found) if value != most[0]]
        if most[1] <= len(found) // 2:
            deviating = [f"rank {number} on {node}: {value:x}" for number, (value, node) in enumerate(found)]
        raise UnhealthyNodeError(
            f"weights differ between ranks that hold the same: {', '.join(deviating)}",
            where=f"step {step}",
            expected="equal weights on every rank; they were when last compared, at most "
            f"{self._every_steps} steps ago",
            fix=_LEAVE_OUT,
        )


class ShardCheck(Hook):
    """Finds bits that flip in divided weights and moments, which no other rank has to compare with.

    Nothing but an update may change them, so their sums are taken after one and again before the next. All memory is
    looked at in every step; what was found is read, and told to the other ranks, every `every_steps` steps. An update
    itself, a small part of a step, is not watched.

    Raises: UnhealthyNodeError (exit code 79), on every rank, naming the ranks and machines with such bits.
    """

    def __init__(self, every_steps: int = 100) -> None:
        self._every_steps = every_steps
        self._after_update: list[Tensor] = []
        self._differs: Tensor | None = None

    def at_start(self, trainer: TrainerControl) -> None:
        self._after_update = []

    def on_rollback(self, trainer: TrainerControl) -> None:
        self.at_start(trainer)

    def before_update(self, step: StepContext, trainer: TrainerControl) -> None:
        if self._after_update:
            pairs = zip(self._after_update, _sums(trainer.engine.sharded_tensors()), strict=True)
            found = torch.stack([(before != now).any().to(trainer.engine.device) for before, now in pairs]).any()
            self._differs = found if self._differs is None else self._differs | found

    def after_step(self, result: StepResult, trainer: TrainerControl) -> None:
        self._after_update = _sums(trainer.engine.sharded_tensors())
        if world_size() > 1 and result.step % self._every_steps == 0:
            self._tell(result.step)

    def _tell(self, step: int) -> None:
        differs, self._differs = self._differs, None
        found = gather_objects((differs is not None and bool(differs), platform.node()))
        deviating = [f"rank {number} on {node}" for number, (is_uneven, node) in enumerate(found) if is_uneven]
        if deviating:
            raise UnhealthyNodeError(
                f"weights or moments have changed between two steps: {', '.join(deviating)}",
                where=f"step {step}",
                expected="memory that only changes when it is written to; it did until "
                f"{self._every_steps} steps ago at least",
                fix=_LEAVE_OUT,
            )


_LEAVE_OUT = "leave that machine out, remove the checkpoints of these steps, and go on with --resume"


def _sums(tensors: list[Tensor]) -> list[Tensor]:
    """The sum of each tensor's words, as integers, stacked by device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    with torch.no_grad():
        for tensor in tensors:
            if tensor.numel():
                by_device.setdefault(tensor.device, []).append(_words(tensor).sum(dtype=torch.int64))
        return [torch.stack(sums) for sums in by_device.values()]


def checksum(tensors: list[Tensor]) -> int:
    """A number that any flipped bit changes: the sum of all words, as integers. One fetch a device."""
    return sum(int(sums.sum()) for sums in _sums(tensors))


def _words(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().view(-1)
    if flat.dtype == torch.bool:
        return flat
    return flat.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[flat.itemsize])
