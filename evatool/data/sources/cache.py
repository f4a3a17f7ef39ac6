"""Remote shards in a folder of bounded size on this machine, shared by all of its ranks and loader processes.

A shard is fetched by one process while the others wait for it, and lands under its name only when it is whole. What
was not used longest goes first; a process that has a shard open can read it to the end.

Shards are training data, so nobody else may put them there. The default folder is this user's alone, one that the
recipe names is not open to everyone, no link in it is followed (`core.own_folder`), and a shard's content is checked
whenever it is used: its size each time, its checksum, where the manifest has one, once a file. A note beside it
(`<shard>.note`) says which file that was, by inode, size and time of writing; when the note was written last is when
the shard was used last.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from evatool.core.errors import DataError
from evatool.core.own_folder import NotOursError, OwnFolder
from evatool.data.sources.fetch import CHUNK_BYTES, FetchError, Patience, display_url, fetch_file

log = logging.getLogger(__name__)

RETRY_SEC = 900.0
"""A shard that did not come after all tries is tried again after this."""

_LOCKS = 512  # lock files; two shards may share one, which costs a wait and nothing else
_LONGEST_FETCH_SEC = 600.0  # of another process, all its tries
_FIX = "remove the folder, or set data.remote.cache_dir to a folder of your own"


class ShardCache:
    """Fetched shards by URL.

    Args:
        folder: made if absent; `default_cache_folder()` when None.
        max_bytes: most bytes of shards kept.
        patience: with the store.
    Raises: DataError where a named folder cannot be made, or others could have put files there; of the default one
    that is found out when it is used first.
    """

    def __init__(self, folder: Path | None, max_bytes: int, patience: Patience) -> None:
        self.folder = folder or default_cache_folder()
        self.max_bytes, self.patience = max_bytes, patience
        self._is_named = folder is not None
        if self._is_named:
            assert self._own is not None, "a folder that the recipe names is checked at the start"
        self._ahead: _Ahead | None = None
        self._failed: dict[str, tuple[float, FetchError]] = {}

    @cached_property
    def _own(self) -> OwnFolder:
        """The folder, checked on its first use: a run of local shards alone needs no default one."""
        own = OwnFolder(self.folder, is_named=self._is_named, fix=_FIX)
        try:
            with own.opened("locks"):
                pass
        except OSError as err:
            raise DataError(
                f"the folder for fetched shards cannot be made: {err.strerror}",
                where=str(self.folder),
                fix="set data.remote.cache_dir to a folder that can be written",
            ) from err
        return own

    def path(self, url: str) -> Path:
        """The path at which a shard is kept once it is fetched."""
        return self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.tar"

    def index_folder(self) -> Path:
        """The folder in which indexes of plain tars are kept: checked and, if it can be, made."""
        with contextlib.suppress(OSError), self._own.opened("indexes"):
            pass
        return self.folder / "indexes"

    def get(self, url: str, *, size: int = -1, sha256: str | None = None) -> Path:
        """The shard's file, fetched if it is not here or has another content.

        Args:
            size, sha256: the manifest's, which the file has; -1 and None where there are none.
        Raises: FetchError after the last try; DataError where the folder is not to be trusted any more.
        """
        path = self.path(url)
        self._check_failed(url)
        if not self._is_here(path, size, sha256, may_read=False):
            # Where the process that fetches has been stopped, this one fetches for itself, which harms nobody.
            with self._locked(path, _LONGEST_FETCH_SEC):
                self._check_failed(url)
                if not self._is_here(path, size, sha256, may_read=True):
                    try:
                        self._fetch(url, path, size, sha256)
                    except FetchError as err:
                        self._failed[url] = (time.monotonic(), err)
                        raise
        return path

    def fetch_ahead(self, shards: Sequence[tuple[str, int, str | None]]) -> None:
        """Fetch (url, size, sha256) of each in a thread of this process, in order. Errors are left to `get`."""
        if self._ahead is None or self._ahead.process != os.getpid():
            self._ahead = _Ahead(self)
        self._ahead.add(list(dict.fromkeys(shards)))

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """One process of this machine at a time, without end of waiting: it may scan thousands of tars."""
        with self._lock_file("scan") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ahead": None}

    def _check_failed(self, url: str) -> None:
        """Raises: FetchError where this process has lately had all its tries."""
        failed = self._failed.get(url)
        if failed is not None and time.monotonic() - failed[0] < RETRY_SEC:
            raise failed[1]

    def _is_here(self, path: Path, size: int, sha256: str | None, *, may_read: bool) -> bool:
        """True if the file at `path` is ours and has the content that is asked for; it then counts as used now.

        Args:
            may_read: look for the checksum in the file where no note tells it. That takes a while, so that only the
                process that holds the shard's lock does it.
        """
        with self._own.opened() as folder:
            try:
                handle = self._own.open_file(folder, path.name, os.O_RDONLY)
            except FileNotFoundError:
                return False
            except NotOursError as err:
                problem: str | None = err.what
            else:
                with contextlib.closing(os.fdopen(handle, "rb")):
                    problem = self._problem_of(folder, handle, path, size, sha256, may_read=may_read)
        if problem and may_read:  # without the lock it may be of a file that is just being replaced
            log.warning("%s is fetched again: %s", path, problem)
        return problem is None

    def _problem_of(
        self, folder: int, handle: int, path: Path, size: int, sha256: str | None, *, may_read: bool
    ) -> str | None:
        """Why a fetched shard cannot be used as it is; None where it can, which is then noted."""
        found = os.fstat(handle)
        note = self._read_note(folder, path)
        was_checked = note[:3] == [found.st_ino, found.st_size, found.st_mtime_ns]
        expected = size if size >= 0 or not note else note[1]
        if expected not in (-1, found.st_size):
            return f"it has {found.st_size} bytes instead of {expected}"
        if sha256 is not None and not (was_checked and note[3] == sha256):
            if not may_read:
                return "its checksum has not been looked at"
            if _checksum(handle) != sha256:
                return "it has another checksum than the manifest says"
        self._write_note(folder, path, found, sha256 or (note[3] if was_checked else None))
        return None

    def _read_note(self, folder: int, path: Path) -> list[Any]:
        """Inode, size, time of writing in nanoseconds and checksum of the file that was checked; empty for none."""
        try:
            with open(self._own.open_file(folder, _note_of(path), os.O_RDONLY), "rb") as file:
                note = json.loads(file.read(1000))
        except (OSError, ValueError, NotOursError):
            return []
        is_whole = isinstance(note, list) and len(note) == 4 and all(isinstance(number, int) for number in note[:3])
        return note if is_whole else []

    def _write_note(self, folder: int, path: Path, found: os.stat_result, sha256: str | None) -> None:
        note = [found.st_ino, found.st_size, found.st_mtime_ns, sha256]
        if self._read_note(folder, path) == note:
            with contextlib.suppress(OSError):  # another member of a shared folder wrote it
                os.utime(_note_of(path), dir_fd=folder, follow_symlinks=False)
            return
        # A full disk: the file is checked again next time.
        with contextlib.suppress(OSError), self._unfinished(folder, f"{path.stem}.note") as (partial, file):
            file.write(json.dumps(note).encode())
            file.flush()
            os.replace(partial, _note_of(path), src_dir_fd=folder, dst_dir_fd=folder)

    def _fetch(self, url: str, path: Path, size: int, sha256: str | None) -> None:
        start = time.monotonic()
        with self._own.opened() as folder:
            try:
                with self._unfinished(folder, path.stem) as (partial, file):
                    fetch_file(url, file, self.patience, max_bytes=self.max_bytes, size=size, sha256=sha256)
                    file.flush()
                    found = os.fstat(file.fileno())
                    self._write_note(folder, path, found, sha256)
                    self._evict(folder, path, found.st_size)
                    os.replace(partial, path.name, src_dir_fd=folder, dst_dir_fd=folder)
            except OSError as err:
                raise FetchError("cache-full", f"{self.folder} cannot be written: {err}") from err
            log.debug("fetched %s: %d bytes in %.1f s", display_url(url), found.st_size, time.monotonic() - start)
            self._evict(folder, path)  # other processes may have finished theirs at the same moment

    @contextlib.contextmanager
    def _unfinished(self, folder: int, stem: str) -> Iterator[tuple[str, BinaryIO]]:
        """The name of a new file and the file, locked while it is written: without its lock it is nobody's any more.

        It is gone at the end unless it was given another name.
        """
        name = f".{stem}.{os.getpid()}.{threading.get_ident()}.partial"
        try:
            while True:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=folder)  # of a dead process with our number
                file = open(self._own.open_file(folder, name, os.O_RDWR | os.O_CREAT | os.O_EXCL), "wb")  # noqa: SIM115
                with file:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    if os.fstat(file.fileno()).st_nlink:  # else it was cleared away before it was locked
                        yield name, file
                        return
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)

    def _clear(self, folder: int, name: str) -> None:
        """Remove an unfinished file whose writer is gone, whatever any clock says of its age."""
        with contextlib.suppress(OSError, NotOursError):  # being written, or another's
            handle = self._own.open_file(folder, name, os.O_RDWR, is_lock=True)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(name, dir_fd=folder)
            finally:
                os.close(handle)

    def _evict(self, folder: int, keep: Path, num_coming_bytes: int = 0) -> None:
        """Remove what was not used longest until the rest, and so many bytes more, fit."""
        found, used = [], {}
        with os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    stat = entry.stat(follow_symlinks=False)
                    if entry.name.endswith(".partial"):
                        self._clear(folder, entry.name)
                    elif entry.name.endswith(".note"):
                        used[entry.name] = stat.st_mtime_ns
                    elif entry.name.endswith(".tar"):
                        found.append((stat.st_mtime_ns, stat.st_size, entry.name))
        found = [(used.get(_note_of(Path(name)), written), size, name) for written, size, name in found]
        total = num_coming_bytes + sum(size for _, size, _ in found)
        for _, size, name in sorted(found):
            if total <= self.max_bytes:
                break
            if name != keep.name:
                for each in (name, _note_of(Path(name))):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(each, dir_fd=folder)
                total -= size

    @contextlib.contextmanager
    def _locked(self, path: Path, patience_sec: float) -> Iterator[None]:
        """One process at a time per shard, for at most `patience_sec` of waiting. A killed process frees its lock."""
        with self._lock_file(f"{int(path.stem[:8], 16) % _LOCKS:03d}") as handle:
            deadline = time.monotonic() + patience_sec
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.02)
            yield

    @contextlib.contextmanager
    def _lock_file(self, name: str) -> Iterator[int]:
        with self._own.opened("locks") as folder:
            handle = self._own.open_file(folder, name, os.O_RDWR | os.O_CREAT, is_lock=True)
        try:
            yield handle
        finally:
            os.close(handle)


class _Ahead:
    """A thread that fetches what will be wanted next."""

    def __init__(self, cache: ShardCache) -> None:
        self.cache, self.process = cache, os.getpid()
        self._wanted: list[tuple[str, int, str | None]] = []
        self._lock = threading.Lock()
        self._is_running = False

    def add(self, shards: Sequence[tuple[str, int, str | None]]) -> None:
        with self._lock:
            self._wanted = list(shards)  # what was wanted before is being read by now
            if not self._is_running:
                self._is_running = True
                threading.Thread(target=self._run, daemon=True, name="evatool-fetch-ahead").start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._is_running = False
                    return
                url, size, sha256 = self._wanted.pop(0)
            try:
                self.cache.get(url, size=size, sha256=sha256)
            except (FetchError, DataError, OSError) as err:  # the next wish must find this thread alive
                log.debug("not fetched ahead: %s: %s", display_url(url), err)


def default_cache_folder() -> Path:
    """A folder of this user's in the system's temporary folder."""
    return Path(tempfile.gettempdir()) / f"evatool-shards-{os.getuid()}"


def _note_of(path: Path) -> str:
    return f"{path.stem}.note"


def _checksum(handle: int) -> str:
    """SHA-256 of an open file."""
    digest, offset = hashlib.sha256(), 0
    while chunk := os.pread(handle, CHUNK_BYTES, offset):
        digest.update(chunk)
        offset += len(chunk)
    return digest.hexdigest()
