"""How a batch gets from a loader process to the training process: through shared memory, else through a pipe.

Torch packs what a process hands over in a thread whose failures nobody hears of: the batch is lost, and the training
process waits for it for ever. Here a batch is packed where it is made, so that a failure is met there. It then travels
as plain bytes, which takes one copy more, and the training process is told why.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import multiprocessing
import multiprocessing.util
import os
import pickle
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from evatool.core.errors import UsageError
from evatool.data.train.dataset import Made, StepDataset

log = logging.getLogger(__name__)

SHARED_MEMORY = "/dev/shm"

# A Unix socket's address holds 108 bytes with the zero at its end. Python appends both names to the temporary folder.
_MAX_ADDRESS_BYTES = 107
_SOCKET_NAME = "/pymp-12345678/listener-12345678"
_SHORT_FOLDERS = ("/tmp", "/var/tmp", SHARED_MEMORY)
_NO_SHARED_MEMORY = {errno.ENOSPC, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSYS, errno.EDQUOT}


@dataclass
class PackedBatch:
    """A batch on its way.

    Attributes:
        payload: the pickled `Made`; its tensors are inside, or in shared memory where `trouble` is empty.
        trouble: why shared memory could not be used.
        broken: what the training process met when it opened the payload, to be raised where the batch is waited for.
    """

    payload: bytes = b""
    trouble: str = ""
    made: Made | None = None
    broken: BaseException | None = None

    def pin_memory(self) -> PackedBatch:
        """Opened and in pinned memory. The DataLoader calls it in a thread, which must not end with an error."""
        try:
            return PackedBatch(trouble=self.trouble, made=self.open().pin_memory())
        except (OSError, EOFError) as error:
            return PackedBatch(broken=error)

    def open(self) -> Made:
        """The batch. Raises: OSError or EOFError where the process that made it is gone."""
        if self.broken is not None:
            raise self.broken
        if self.made is not None:
            return self.made
        made: Made = pickle.loads(self.payload)  # by our own child process
        return made


class PackingDataset(Dataset[PackedBatch]):
    """A dataset in a loader process, whose items are packed there."""

    def __init__(self, dataset: StepDataset) -> None:
        self._dataset = dataset
        self._trouble = ""

    def __getitem__(self, position: int) -> PackedBatch:
        made = self._dataset[position]
        if not self._trouble:
            try:
                return PackedBatch(bytes(ForkingPickler.dumps(made)))
            except (OSError, RuntimeError) as error:
                # For good: what was shared of this batch so far stays in memory, and must not grow with every batch.
                self._trouble = _first_line(error)
        return PackedBatch(_plain_bytes(made), self._trouble)


def warn_of(trouble: str, made: Made) -> None:
    """Say why batches take the slower way, and what helps."""
    is_address = "AF_UNIX" in trouble
    cause = f"TMPDIR is too long a path for sockets ({tempfile.gettempdir()})" if is_address else _room(made)
    fix = (
        "set TMPDIR to a shorter path"
        if is_address
        else "give it more room (a container: --shm-size=8g, or a memory volume there), or set data.num_workers = 0"
    )
    log.warning(
        "loader processes cannot use shared memory: %s; batches go through pipes, which is slower. %s. (%s)",
        cause,
        fix[0].upper() + fix[1:],
        trouble,
    )


@contextlib.contextmanager
def saying_what_is_missing(num_workers: int) -> Iterator[None]:
    """The start of loader processes, with what the system lacks for it in words. Raises: UsageError."""
    try:
        # A DataLoader that fails while it is made leaves a trace on the terminal, so its semaphores are tried here:
        # three for each queue and five for an event, all in shared memory.
        tried = [multiprocessing.Lock() for _ in range(3 * num_workers + 8)] if num_workers else []
        tried.clear()
        yield
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.ENOMEM):
            raise UsageError(
                f"the loader processes cannot be started: {error.strerror}",
                where=f"data.num_workers = {num_workers}",
                expected="room for that many processes under the limits on processes and memory (ulimit -u)",
                fix="lower data.num_workers, or raise the limit",
            ) from error
        if error.errno not in _NO_SHARED_MEMORY:
            raise
        raise UsageError(
            f"the loader processes cannot be started: {SHARED_MEMORY} holds no more semaphores ({error.strerror})",
            where=f"{SHARED_MEMORY}, data.num_workers = {num_workers}",
            expected=f"a {SHARED_MEMORY} that can be written, with 32 kB for each loader process",
            fix="give it more room (a container: --shm-size=8g, or a memory volume there), or set data.num_workers = 0",
        ) from error


def keep_sockets_short() -> None:
    """Have this process and its children make their sockets in a folder whose path they can be addressed by."""
    if not _is_too_long(tempfile.gettempdir()):
        return
    for folder in _SHORT_FOLDERS:
        if not (os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
            continue
        before, tempfile.tempdir = tempfile.tempdir, folder
        try:
            made = multiprocessing.util.get_temp_dir()  # kept for the process's life, removed at its end
        except OSError:
            continue
        finally:
            tempfile.tempdir = before
        log.info("TMPDIR is too long a path for sockets: those of the loader processes are in %s", made)
        return


def _is_too_long(folder: str) -> bool:
    return len(os.fsencode(folder + _SOCKET_NAME)) > _MAX_ADDRESS_BYTES


def _room(made: Made) -> str:
    needed = len(_plain_bytes(made)) / 2**20
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError as error:
        return f"{SHARED_MEMORY}: {error.strerror}"
    free, size = (n * found.f_frsize / 2**20 for n in (found.f_bavail, found.f_blocks))
    return f"{SHARED_MEMORY} has {free:.3g} of {size:.3g} MiB free, and a batch takes {needed:.3g} MiB"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _PlainPickler(pickle.Pickler):
    """Tensors as numpy arrays, whose bytes are written as they are; torch would make an archive of each."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.from_numpy, (value.detach().contiguous().numpy(),)
        return NotImplemented


def _plain_bytes(made: Made) -> bytes:
    out = io.BytesIO()
    _PlainPickler(out, pickle.HIGHEST_PROTOCOL).dump(made)
    return out.getvalue()
