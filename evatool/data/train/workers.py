"""Loader processes: the same batches in the same order with any number of them, one restart, and no endless wait."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from multiprocessing.process import BaseProcess

import torch
from torch.utils.data import DataLoader, Sampler

from evatool.core.errors import TransientError
from evatool.core.own_process import end_with_parent
from evatool.data.train.dataset import Made, StepDataset
from evatool.data.train.transfer import (
    SHARED_MEMORY,
    PackedBatch,
    PackingDataset,
    keep_sockets_short,
    saying_what_is_missing,
    warn_of,
)

log = logging.getLogger(__name__)

_DEATH = "DataLoader worker"  # begins the RuntimeError for a process that is gone; one passed on says "Caught ..."


def iterate_batches(
    dataset: StepDataset,
    positions: Callable[[], Sampler[int]],
    *,
    num_workers: int,
    max_wait_sec: float,
) -> Generator[Made, None, None]:
    """The dataset's item of each position, in order.

    A process that dies is noticed within seconds; then all are started again at the batch that is due, which changes
    nothing in what comes. Dying twice at one batch, or nothing for `max_wait_sec`, is an error.

    Args:
        positions: makes the sampler of the positions that are still due; called again after a restart.
        num_workers: loader processes; with 0 items are made in this one.
        max_wait_sec: longest wait for one item.
    Raises: TransientError where processes die twice at one batch or hang; UsageError where they cannot be started;
        whatever the dataset raises.
    """
    has_failed = has_warned = False
    if num_workers:
        keep_sockets_short()
    while True:
        with saying_what_is_missing(num_workers):
            attempt = _Attempt(dataset, positions(), num_workers, max_wait_sec)
        try:
            for made in attempt:
                if attempt.trouble and not has_warned:
                    has_warned = True
                    warn_of(attempt.trouble, made)
                yield made
                has_failed = False
            return
        except (RuntimeError, OSError, EOFError) as err:
            if not attempt.is_death(err):
                raise
            what = " ".join(str(err).split())
            if attempt.has_hung or has_failed:
                raise TransientError(
                    f"no batch came for {max_wait_sec:g} s"
                    if attempt.has_hung
                    else f"a loader process died twice: {what}",
                    where=f"processes {', '.join(map(str, attempt.pids))} of this rank",
                    expected="a batch within data.max_wait_sec"
                    if attempt.has_hung
                    else "processes that live; the system kills them when memory runs out",
                    fix="run the same command with --resume; fewer data.num_workers need less memory"
                    + (f", and {SHARED_MEMORY} may be too small" if "Bus error" in what else ""),
                ) from err
            log.warning("%s: the loader processes are started again at the batch that is due", what)
            has_failed = True
        finally:
            attempt.close()


class _Attempt:
    """One set of loader processes.

    Attributes:
        pids: theirs.
        has_hung: True once they were ended for taking too long.
        trouble: why a batch could not come through shared memory; empty while all did.
    """

    def __init__(self, dataset: StepDataset, positions: Sampler[int], num_workers: int, max_wait_sec: float) -> None:
        before = set(multiprocessing.active_children())
        self._iterator = iter(
            DataLoader(
                PackingDataset(dataset) if num_workers else dataset,
                batch_size=None,
                sampler=positions,
                num_workers=num_workers,
                worker_init_fn=partial(_begin_process, _is_main_thread()),
                generator=torch.Generator(),  # its draws must not come out of the training process's generator
                pin_memory=torch.cuda.is_available(),  # so that `Batch.to` does not wait for the copy
            )
        )
        if num_workers:
            _leave_children_to_the_loader()
        self._processes: list[BaseProcess] = sorted(
            set(multiprocessing.active_children()) - before, key=lambda process: process.pid or 0
        )
        self.pids = [process.pid for process in self._processes]
        self.has_hung = self._is_cut_off = False
        self.trouble = ""
        self._waiting_since: float | None = None
        self._is_over = threading.Event()
        if self._processes:
            threading.Thread(target=self._watch, args=(max_wait_sec,), daemon=True, name="evatool-loader-watch").start()

    def __iter__(self) -> Iterator[Made]:
        while True:
            self._waiting_since = time.monotonic()
            try:
                found = next(self._iterator)
                made = found.open() if isinstance(found, PackedBatch) else found
            except StopIteration:
                return
            except BaseException as error:
                self._is_cut_off = not isinstance(error, Exception)
                raise
            finally:
                self._waiting_since = None
            if isinstance(found, PackedBatch):
                self.trouble = self.trouble or found.trouble
            yield made

    def is_death(self, err: BaseException) -> bool:
        """True where an error comes of a process that is gone, and not out of its work."""
        if isinstance(err, RuntimeError):
            return str(err).startswith(_DEATH)
        # Tensors are handed over by the process that made them: its death in the middle is a broken connection.
        is_broken = isinstance(err, ConnectionError | EOFError | FileNotFoundError)
        return is_broken and bool(self._processes) and not str(err).startswith("Caught ")

    def close(self) -> None:
        """End the processes."""
        self._is_over.set()
        if self._is_cut_off:  # one of them may be stuck: the DataLoader would wait five seconds for each
            self._kill()
        del self._iterator

    def _watch(self, max_wait_sec: float) -> None:
        while not self._is_over.wait(min(1.0, max_wait_sec / 4)):
            since = self._waiting_since
            if since is not None and time.monotonic() - since > max_wait_sec:
                # The loader waits for its processes as long as they live.
                self.has_hung = True
                self._kill()
                return

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()


def _leave_children_to_the_loader() -> None:
    # The DataLoader has installed a handler that raises in whatever the training process is doing when a worker dies.
    # Without it the death is noticed where the batch is waited for, every five seconds, and can be handled there.
    if _is_main_thread():
        handler = signal.getsignal(signal.SIGCHLD)
        if getattr(handler, "__module__", "") == "torch.utils.data._utils.signal_handling":
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _begin_process(ends_with_parent: bool, worker: int) -> None:
    if ends_with_parent:  # with the thread that has started it, so only where that lives as long
        end_with_parent()
    # Ctrl-C reaches the whole process group; the training process saves its state and ends the workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
