"""Files that are read from a path of someone's: regular files only, and no more bytes than the reader allows. No torch.

A pipe in place of a file would make a reader wait for ever, a device could give bytes without end.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

MAX_SMALL_FILE_BYTES = 8 * 2**20
"""Limit for files that hold settings, notes or names rather than data."""

MAX_IMAGE_FILE_BYTES = 2**30
"""Limit for an image that lies in a file of its own."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class NotRegularFileError(OSError):
    """A path that names something else than a file with bytes; `strerror` says what."""


def open_regular(path: str | os.PathLike[str], *, buffering: int = -1) -> BinaryIO:
    """A regular file, open to be read as bytes. Never waits for the other end of a pipe.

    Args:
        buffering: as the builtin `open` takes it; 0 for none.
    Raises: NotRegularFileError for a folder, pipe, socket or device; OSError as the file system says.
    """
    _check(path, os.stat(path).st_mode)  # before it is opened: opening alone can set a device to work
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _check(path, os.fstat(descriptor).st_mode)  # what was opened may be another file by now
        return os.fdopen(descriptor, "rb", buffering=buffering)
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | os.PathLike[str], max_bytes: int = MAX_SMALL_FILE_BYTES) -> bytes:
    """All bytes of a regular file of at most `max_bytes`.

    Raises: OSError with EFBIG for a larger one, before it is read; else as `open_regular`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(max_bytes + 1) if size <= max_bytes else b""
    if max(size, len(data)) > max_bytes:
        raise OSError(errno.EFBIG, f"the file has {size} bytes, and at most {max_bytes} are read", str(path))
    return data


def read_regular_text(path: str | os.PathLike[str], max_bytes: int = MAX_SMALL_FILE_BYTES) -> str:
    """A text file in UTF-8, a byte-order mark at its start left out.

    Raises: UnicodeDecodeError, which is a ValueError, for other bytes; OSError as `read_regular`.
    """
    return read_regular(path, max_bytes).decode("utf-8-sig")


def is_regular(path: Path) -> bool:
    """True where `path` names a regular file, or a link to one, that can be looked at."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):  # a name with a zero byte is a ValueError
        return False


def _check(path: str | os.PathLike[str], mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
        raise NotRegularFileError(errno.EINVAL, f"not a regular file but {kind}", str(path))
