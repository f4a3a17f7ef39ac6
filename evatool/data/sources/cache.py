"""Remote shards in a folder of bounded size on this machine, shared by all of its ranks and loader processes.

A shard is fetched by one process while the others wait for it, and lands under its name only when it is whole. What
was not used longest goes first; a process that has a shard open can read it to the end.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evatool.core.errors import DataError
from evatool.data.sources.fetch import FetchError, Patience, display_url, fetch_file

log = logging.getLogger(__name__)

RETRY_SEC = 900.0
"""A shard that did not come after all tries is tried again after this."""

_LOCKS = 512  # lock files; two shards may share one, which costs a wait and nothing else
_LONGEST_FETCH_SEC = 600.0  # of another process, all its tries
_STALE_SEC = 3600.0  # age at which an unfinished file is of a process that died


class ShardCache:
    """Fetched shards by URL.

    Args:
        folder: made if absent; `default_cache_folder()` when None.
        max_bytes: most bytes of shards kept.
        patience: with the store.
    Raises: DataError where the folder cannot be made.
    """

    def __init__(self, folder: Path | None, max_bytes: int, patience: Patience) -> None:
        self.folder = folder or default_cache_folder()
        self.max_bytes, self.patience = max_bytes, patience
        try:
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise DataError(
                f"the folder for fetched shards cannot be made: {err.strerror}",
                where=str(self.folder),
                fix="set data.remote.cache_dir to a folder that can be written",
            ) from err
        self._ahead: _Ahead | None = None
        self._failed: dict[str, tuple[float, FetchError]] = {}

    def path(self, url: str) -> Path:
        """The path at which a shard is kept once it is fetched."""
        return self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.tar"

    def get(self, url: str, *, size: int = -1, sha256: str | None = None) -> Path:
        """The shard's file, fetched if it is not here.

        Args:
            size, sha256: the manifest's, checked when the shard is fetched; -1 and None where there are none.
        Raises: FetchError after the last try.
        """
        path = self.path(url)
        self._check_failed(url)
        if not self._touch(path):
            # Where the process that fetches has been stopped, this one fetches for itself, which harms nobody.
            with self._locked(path, _LONGEST_FETCH_SEC):
                self._check_failed(url)
                if not self._touch(path):
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
        handle = os.open(self.folder / "locks" / "scan", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ahead": None}

    def _check_failed(self, url: str) -> None:
        """Raises: FetchError where this process has lately had all its tries."""
        failed = self._failed.get(url)
        if failed is not None and time.monotonic() - failed[0] < RETRY_SEC:
            raise failed[1]

    def _touch(self, path: Path) -> bool:
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _fetch(self, url: str, path: Path, size: int, sha256: str | None) -> None:
        partial = path.with_name(f".{path.stem}.{os.getpid()}.{threading.get_ident()}.partial")
        start = time.monotonic()
        try:
            fetch_file(url, partial, self.patience, max_bytes=self.max_bytes, size=size, sha256=sha256)
            os.replace(partial, path)
        except OSError as err:
            raise FetchError("cache-full", f"{partial.parent} cannot be written: {err}") from err
        finally:
            partial.unlink(missing_ok=True)
        num_bytes = path.stat().st_size
        log.debug("fetched %s: %d bytes in %.1f s", display_url(url), num_bytes, time.monotonic() - start)
        self._evict(path)

    def _evict(self, keep: Path) -> None:
        """Remove what was not used longest until the rest fits."""
        found = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):
                stat = entry.stat()
                if entry.name.endswith(".partial") and time.time() - stat.st_mtime > _STALE_SEC:
                    os.unlink(entry.path)
                elif entry.name.endswith(".tar"):
                    found.append((stat.st_mtime_ns, stat.st_size, entry.path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.max_bytes:
                break
            if path != str(keep):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                total -= size

    @contextlib.contextmanager
    def _locked(self, path: Path, patience_sec: float) -> Iterator[None]:
        """One process at a time per shard, for at most `patience_sec` of waiting. A killed process frees its lock."""
        handle = os.open(self.folder / "locks" / f"{int(path.stem[:8], 16) % _LOCKS:03d}", os.O_RDWR | os.O_CREAT)
        try:
            deadline = time.monotonic() + patience_sec
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.02)
            yield
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
            except (FetchError, OSError) as err:  # the next wish must find this thread alive
                log.debug("not fetched ahead: %s: %s", display_url(url), err)


def default_cache_folder() -> Path:
    """A folder of this user's in the system's temporary folder."""
    return Path(tempfile.gettempdir()) / f"evatool-shards-{os.getuid()}"
