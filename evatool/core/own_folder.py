"""Folders whose files can be trusted, because nobody else can have put them there. No torch.

Caches lie in places where others write too: the system's temporary folder, shared disks. A folder that evatool chose
itself must be this user's and open to nobody else; one that the recipe names may be shared, but not with everyone. No
link is followed within either: files are opened below the open folder, not by their paths. POSIX only.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from evatool.core.errors import DataError

log = logging.getLogger(__name__)


class NotOursError(DataError):
    """A folder or file of a cache could have been written by someone else."""


class OwnFolder:
    """A folder of files that evatool writes and trusts.

    Args:
        path: of the folder, made when it is first opened.
        is_named: the recipe names it, so it may be shared with others; otherwise it must be this user's alone.
        fix: what to do where it is refused.
    """

    def __init__(self, path: Path, *, is_named: bool, fix: str) -> None:
        self.path, self.is_named, self.fix = path, is_named, fix

    @contextlib.contextmanager
    def opened(self, inner: str = "") -> Iterator[int]:
        """The descriptor of the folder, or of the folder `inner` in it: checked, and made where it is absent.

        Raises: NotOursError; OSError where it cannot be made or opened.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = self._open(str(self.path), None, follows=self.is_named)
        try:
            if inner:
                outer, folder = folder, self._open(inner, folder, follows=False)
                os.close(outer)
            yield folder
        finally:
            os.close(folder)

    def open_file(self, folder: int, name: str, flags: int, *, is_lock: bool = False) -> int:
        """The descriptor of a file in an open folder, which is closed to others when this call makes it.

        Args:
            is_lock: nothing is read from it, so that it matters less whose it is.
        Raises: NotOursError where it is a link, no regular file, or another's; OSError.
        """
        permissions = 0o664 if self.is_named else 0o600
        try:
            # Without O_NONBLOCK a named pipe would be waited for.
            handle = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, permissions, dir_fd=folder)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EMLINK, errno.EISDIR, errno.ENXIO):
                raise self._refusal("a file in it is a link or no regular file", name) from error
            raise
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            os.close(handle)
            raise self._refusal("a file in it is no regular file", name)
        if not (is_lock or self._is_trusted(found)):
            os.close(handle)
            raise self._refusal(f"a file in it {_whose(found)}", name)
        return handle

    def _open(self, name: str, folder: int | None, *, follows: bool) -> int:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o775 if self.is_named else 0o700, dir_fd=folder)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if follows else os.O_NOFOLLOW)
        try:
            handle = os.open(name, flags, dir_fd=folder)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR) and os.path.lexists(self.path):
                raise self._refusal("it is a link or a file", name) from error
            raise
        found = os.fstat(handle)
        is_open_to_all = bool(found.st_mode & stat.S_IWOTH)
        if is_open_to_all or not (self.is_named or found.st_uid == os.geteuid()):
            os.close(handle)
            raise self._refusal(f"it {_whose(found)}", name)
        if not self.is_named and found.st_mode & 0o077:
            os.fchmod(handle, 0o700)  # as the umask of an older version left it
        return handle

    def _is_trusted(self, found: os.stat_result) -> bool:
        """True for a file that only this user, or only those who share the folder, can have written."""
        if self.is_named:
            return not found.st_mode & stat.S_IWOTH
        is_private = not found.st_mode & (stat.S_IWOTH | stat.S_IWGRP) and found.st_nlink == 1
        return is_private and found.st_uid == os.geteuid()

    def _refusal(self, why: str, name: str) -> NotOursError:
        expected = "a folder that not everyone can write" if self.is_named else "a folder of this user and nobody else"
        return NotOursError(
            f"the cache folder is not ours: {why}",
            where=str(self.path / name),
            expected=f"{expected}, with regular files in it",
            fix=self.fix,
        )


def _whose(found: os.stat_result) -> str:
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid} and not to {os.geteuid()} (permissions {stat.filemode(found.st_mode)})"
    return f"can be written by others (permissions {stat.filemode(found.st_mode)}, {found.st_nlink} names)"


def user_cache_folder() -> Path | None:
    """A folder for what is kept between runs, checked: `evatool` in the user's cache folder (XDG_CACHE_HOME, else
    ~/.cache), or one in the system's temporary folder where there is no home that can be written.

    Returns: None where there is no such folder of this user's alone; a warning says why, and nothing is kept.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    fallback = Path(tempfile.gettempdir()) / f"evatool-cache-{os.getuid()}"
    problems: list[str] = []
    for path in ([Path(base) / "evatool"] if os.path.isabs(base) else []) + [fallback]:
        try:
            with OwnFolder(path, is_named=False, fix="remove it, or set XDG_CACHE_HOME").opened():
                if problems:
                    log.warning("%s; what is kept between runs goes to %s", problems[0], path)
                return path
        except NotOursError as error:
            problems.append(f"{error.what} ({path})")
        except OSError as error:
            problems.append(f"{path} cannot be written ({error.strerror})")
    log.warning("nothing is kept between runs: %s", "; ".join(problems))
    return None


def expand_user(path: str | Path) -> Path:
    """The path with its `~` replaced, and as it is where this user has no home."""
    return Path(os.path.expanduser(path))
