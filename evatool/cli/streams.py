"""Standard output and error that outlive their readers: `evatool ... | head` must not end a run."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import Any, TextIO

_GONE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.EBADF)  # a reader that has left, a terminal that was closed


class SteadyStream:
    """A text stream around one of the process's own that goes quiet once nobody reads it.

    The file behind it then becomes the null device, for native code and child processes as well.

    Args:
        stream: sys.stdout or sys.stderr, with a file behind it.
        bears_all: also what a full disk does not take is dropped. Not for results, of which half must not pass for all.
    """

    def __init__(self, stream: TextIO, *, bears_all: bool) -> None:
        self._stream, self._bears_all = stream, bears_all

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._bear(error)
            return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._bear(error)

    def _bear(self, error: OSError) -> None:
        if error.errno in _GONE:
            send_nowhere(self._stream)
        elif not self._bears_all:
            raise error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def send_nowhere(stream: Any) -> None:
    """Have what is written to a stream's file from here on, and what is still in its buffer, vanish."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def keep_streams() -> None:
    """Make the process's own streams steady; one that was closed from the start (`>&-`) goes nowhere.

    Streams that someone has put in their place, such as a test's, are left alone.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            _keep_number_taken(number)
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, it stays open as long as the process
        elif isinstance(stream, io.TextIOWrapper) and _is_own(stream, number):
            setattr(sys, name, SteadyStream(stream, bears_all=number == 2))


def _keep_number_taken(number: int) -> None:
    """Open the null device as this file number: else the next file that is opened, a shard or a checkpoint, gets it,
    and native code that writes to its standard output or error writes into that file."""
    with contextlib.suppress(OSError):
        os.fstat(number)
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)


def _is_own(stream: io.TextIOWrapper, number: int) -> bool:
    try:
        return stream.fileno() == number
    except (OSError, ValueError):
        return False
