"""Files that one process holds open for reading: bounded over all sources and readers, however many tars there are.

A tar is read here and there over a whole window, so it is worth holding it open; but a process may have few files open
at once (`ulimit -n`, often 1,024), and its loader, logs and sockets need some, too.
"""

from __future__ import annotations

import errno
import itertools
import os
import resource
import stat
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path

MAX_OPEN = 256
"""Most files held open by a process; fewer where a quarter of `ulimit -n` is less."""

_FEWEST = 4
_numbers = itertools.count()


class OpenFiles:
    """Open files by key; what was not used longest is closed first, and nothing while it is being read.

    Threads may share one. A forked process goes on with the files that it inherits: they are read at explicit offsets,
    so two processes that share one take nothing from each other.
    """

    def __init__(self) -> None:
        self._files: OrderedDict[Hashable, list[int]] = OrderedDict()  # key -> [descriptor, readers]
        self._lock = threading.Lock()
        self._unwanted: deque[Hashable] = deque()
        os.register_at_fork(after_in_child=self._after_fork)

    def __len__(self) -> int:
        return len(self._files)

    def acquire(self, key: Hashable, open_it: Callable[[], int]) -> int:
        """A descriptor to read from until `release`.

        Args:
            open_it: opens the file where it is not open; it may call this object, and raise.
        """
        with self._lock:
            if self._unwanted:
                self._close_unwanted()
            found = self._files.get(key)
            if found is not None:
                self._files.move_to_end(key)
                found[1] += 1
                return found[0]
        descriptor = open_it()
        with self._lock:
            found = self._files.get(key)
            if found is not None:  # another thread was faster
                os.close(descriptor)
                found[1] += 1
                return found[0]
            self._files[key] = [descriptor, 1]
            self._close_beyond(most_open())
        return descriptor

    def release(self, key: Hashable) -> None:
        """Say that what `acquire` gave is no longer being read."""
        with self._lock:
            if key in self._files:
                self._files[key][1] -= 1

    def close(self, keys: Iterable[Hashable]) -> None:
        """Close those of these files that are open: now, or where another call is under way, in the next one.

        It never waits, so that an object may call it while the garbage collector takes it away.
        """
        self._unwanted.extend(keys)
        if self._lock.acquire(blocking=False):
            try:
                self._close_unwanted()
            finally:
                self._lock.release()

    def make_room(self) -> bool:
        """Close half of what nobody is reading, because the process may open no more; False where there is nothing."""
        with self._lock:
            self._close_unwanted()
            before = len(self._files)
            self._close_beyond(before // 2)
            return len(self._files) < before

    def _close_beyond(self, most: int) -> None:
        idle = [key for key, (_, readers) in self._files.items() if readers == 0]
        for key in idle[: max(0, len(self._files) - most)]:
            os.close(self._files.pop(key)[0])

    def _close_unwanted(self) -> None:
        while self._unwanted:
            found = self._files.pop(self._unwanted.popleft(), None)
            if found is not None:
                os.close(found[0])

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        for found in self._files.values():
            found[1] = 0


FILES = OpenFiles()
"""The files that this process holds open for its sources and readers."""


def new_reader() -> int:
    """A number for a reader's keys, which no other reader of this process has."""
    return next(_numbers)


def most_open() -> int:
    """Most files to be held open by this process as its limit is now."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN if limit == resource.RLIM_INFINITY else max(_FEWEST, min(MAX_OPEN, limit // 4))


def open_for_reading(path: Path, *, follows_links: bool = True) -> int:
    """A descriptor of a regular file.

    Args:
        follows_links: False for a file of ours, which is no link.
    Raises: OSError, also where it is a pipe, a device or a folder: reading those could wait for ever.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | (0 if follows_links else os.O_NOFOLLOW)
    while True:
        try:
            descriptor = os.open(path, flags)  # a pipe without a writer would wait
            break
        except OSError as err:
            if not is_too_many(err) or not FILES.make_room():
                raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def is_too_many(err: BaseException | None) -> bool:
    """True for an error that says, or was caused by one that says, that too many files are open."""
    while err is not None:
        if isinstance(err, OSError) and err.errno in (errno.EMFILE, errno.ENFILE):
            return True
        err = err.__cause__
    return False
