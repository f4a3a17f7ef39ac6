"""Disks that are full or fail: what an error means, and files whose writers bear it for a while. No torch."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evatool.core.errors import EvatoolError, TransientError

log = logging.getLogger(__name__)

_TROUBLES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk is full: the quota is used up",
    errno.EFBIG: "a file has reached the limit on file sizes (ulimit -f)",
    errno.EIO: "the disk has failed: input/output error",
}
_NO_ROOM_BYTES = 64 * 1024


def disk_trouble(error: BaseException) -> str | None:
    """What is wrong with a disk, where an error is one of those that ask for room or another disk; else None."""
    return _TROUBLES.get(error.errno or 0) if isinstance(error, OSError) else None


def disk_error(error: BaseException, folder: Path, fix: str) -> TransientError | None:
    """The error to raise in place of one that comes of a full or failing disk; None for any other.

    A library's own error counts where an OSError is behind it, or where the disk of `folder` has no room left: torch
    and safetensors say "failed writing file" and no more.

    Args:
        folder: what was being written, where the error names no file.
        fix: what to do once there is room.
    """
    if isinstance(error, EvatoolError) or not isinstance(error, Exception):
        return None  # it says what is wrong, or is no failure
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        what = disk_trouble(link)
        if what is not None and isinstance(link, OSError):
            return TransientError(what, where=str(link.filename or folder), fix=f"free some space, then {fix}")
        link = link.__cause__ or link.__context__
    if isinstance(error, RuntimeError) and _free_bytes(folder) < _NO_ROOM_BYTES:
        return TransientError("the disk is full", where=str(folder), fix=f"free some space, then {fix}")
    return None


def _free_bytes(folder: Path) -> int:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return _NO_ROOM_BYTES


@contextmanager
def can_wait(what: str) -> Iterator[None]:
    """Around a write that a run can do without: a full or failing disk is a warning.

    Args:
        what: names what is written, at the beginning of a sentence.
    """
    try:
        yield
    except OSError as error:
        trouble = disk_trouble(error)
        if trouble is None:
            raise
        log.warning("%s is not written: %s", what, trouble)


class LineFile:
    """A text file that grows by whole lines. What a full disk does not take is kept, and written with the next line.

    Args:
        path: appended to; made with the first line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._kept = b""
        self._error: OSError | None = None

    def append(self, line: str) -> None:
        """Add a line; a disk that does not take it is a warning, once until it does again."""
        self._kept += line.encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if disk_trouble(error) is None:
                raise
            if self._error is None:
                log.warning("%s: %s; its lines are kept and written later", self._path, disk_trouble(error))
            self._error = error

    def settle(self) -> None:
        """Write what was kept. Raises: OSError where the disk still does not take it."""
        if self._kept:
            self._write()

    def close(self) -> None:
        """Close the file; what was kept is tried once more, and given up with a warning."""
        try:
            self.settle()
        except OSError as error:
            log.warning("%s: the last lines could not be written: %s", self._path, error.strerror)
        self._kept = b""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _write(self) -> None:
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        while self._kept:  # a disk that fills takes a part of it: the rest follows where that ends
            self._kept = self._kept[os.write(self._descriptor, self._kept) :]
        self._error = None
