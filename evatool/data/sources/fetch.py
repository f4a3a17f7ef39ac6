"""One file from another machine, whole and in order, with an end to waiting.

`http` and `https` are read by the standard library, everything else by fsspec (`s3://`, `gs://`, `memory://`, ...),
which names the package a protocol needs where that is missing. Those clients follow redirects as they see fit; `http`
and `https` do as `redirects` says.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import queue
import threading
import time
import urllib.error
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import urlsplit

from evatool.core.errors import DependencyError
from evatool.data.sources.redirects import RefusedRedirectError, open_url

log = logging.getLogger(__name__)

T = TypeVar("T")

CHUNK_BYTES = 1 << 20
_MIN_BYTES = 1 << 16  # a try that brings less than this in its time is as good as stalled
_MAX_PAUSE_SEC = 30.0

TRANSIENT_CAUSES = frozenset({"timeout", "connection", "server-error", "partial-body"})
"""Causes that can be gone a minute later; a run that ends of them ends with exit code 76."""


class FetchError(Exception):
    """A file that did not come.

    Args:
        cause: "missing-shard", "forbidden", "timeout", "connection", "server-error", "partial-body", "too-large",
            "changed-shard" (other bytes than the manifest says), "refused-redirect" or "unreachable".
        detail: the answer or value that was found wrong.
    """

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause, self.detail = cause, detail


@dataclass(frozen=True)
class Patience:
    """What is borne with a store: tries, seconds without bytes before a try fails, first pause between tries, and
    redirects to addresses that only this machine or its network can reach."""

    attempts: int = 4
    timeout_sec: float = 30.0
    backoff_sec: float = 1.0
    allow_private_redirects: bool = False

    def pauses(self) -> Iterator[float]:
        """The pause after each failed try but the last."""
        for attempt in range(self.attempts - 1):
            yield min(_MAX_PAUSE_SEC, self.backoff_sec * 2**attempt)


def is_remote(url: str) -> bool:
    """True for a URL; `file://` and plain paths are local."""
    scheme = url.partition("://")[0] if "://" in url else ""
    return len(scheme) > 1 and scheme != "file"


def local_path(url: str) -> Path:
    """The path of a local shard."""
    return Path(url.removeprefix("file://"))


def display_url(url: str) -> str:
    """A URL without its query and user, which may hold credentials."""
    if not is_remote(url):
        return url
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def fetch_bytes(url: str, patience: Patience, max_bytes: int) -> bytes:
    """A small remote file. Raises: FetchError after the last try."""
    return _with_patience(url, patience, lambda: b"".join(_chunks(url, patience, max_bytes)))


def fetch_file(url: str, file: BinaryIO, patience: Patience, *, max_bytes: int, size: int, sha256: str | None) -> None:
    """Fetch into an open file, which need not be whole after an error.

    Args:
        size, sha256: the manifest's, which the file must have; -1 and None where there are none.
    Raises: FetchError after the last try; OSError where the file cannot be written.
    """

    def once() -> None:
        digest, num_bytes = hashlib.sha256(), 0
        file.seek(0)
        file.truncate()  # what an earlier try brought
        with closing(_chunks(url, patience, max_bytes)) as chunks:
            for chunk in chunks:
                file.write(chunk)
                num_bytes += len(chunk)
                if sha256 is not None:
                    digest.update(chunk)
        if size >= 0 and num_bytes != size:
            raise FetchError("changed-shard", f"{num_bytes} bytes instead of {size}")
        if sha256 is not None and digest.hexdigest() != sha256:
            raise FetchError("changed-shard", f"sha256 {digest.hexdigest()[:12]}... instead of {sha256[:12]}...")

    _with_patience(url, patience, once)


def _with_patience(url: str, patience: Patience, once: Callable[[], T]) -> T:
    pauses = patience.pauses()
    attempt = 1
    while True:
        try:
            return once()
        except FetchError as err:
            pause = None if err.cause == "refused-redirect" else next(pauses, None)
            if pause is None:
                raise FetchError(err.cause, f"{err.detail}, {attempt} tries") from err
            log.info("%s: %s; try %d in %.1f s", display_url(url), err, attempt + 1, pause)
            attempt += 1
            time.sleep(pause)


def _chunks(url: str, patience: Patience, max_bytes: int) -> Generator[bytes, None, None]:
    timeout_sec = patience.timeout_sec
    if url.startswith(("http://", "https://")):
        source = _http_chunks(url, patience)
    else:
        source = _watched(_fsspec_chunks(url), timeout_sec)
    total, since, at_mark = 0, time.monotonic(), 0
    with closing(source):
        for chunk in source:
            total += len(chunk)
            if total > max_bytes:
                raise FetchError("too-large", f"more than {max_bytes} bytes")
            now = time.monotonic()
            if now - since > timeout_sec:
                if total - at_mark < _MIN_BYTES:
                    raise FetchError("timeout", f"{total - at_mark} bytes in {now - since:.0f} s")
                since, at_mark = now, total
            yield chunk


def _http_chunks(url: str, patience: Patience) -> Generator[bytes, None, None]:
    timeout_sec = patience.timeout_sec
    try:
        # The timeout holds for connecting and for each wait for bytes, not for the whole file.
        with open_url(url, timeout_sec, allow_private=patience.allow_private_redirects) as response:
            expected = response.headers.get("Content-Length")
            total = 0
            while chunk := response.read1(CHUNK_BYTES):
                total += len(chunk)
                yield chunk
            if expected is not None and expected.isdecimal() and total != int(expected):
                raise FetchError("partial-body", f"{total} of {expected} bytes came")
    except RefusedRedirectError as err:
        raise FetchError("refused-redirect", str(err)) from err
    except urllib.error.HTTPError as err:
        raise FetchError(_http_cause(err.code), f"HTTP {err.code} {err.reason}") from err
    except TimeoutError as err:
        raise FetchError("timeout", f"no byte in {timeout_sec:g} s") from err
    except urllib.error.URLError as err:
        cause = "timeout" if isinstance(err.reason, TimeoutError) else "connection"
        raise FetchError(cause, str(err.reason)) from err
    except http.client.IncompleteRead as err:
        raise FetchError("partial-body", str(err)) from err
    except (http.client.HTTPException, ConnectionError, OSError) as err:
        raise FetchError("connection", f"{type(err).__name__}: {err}") from err


def _http_cause(code: int) -> str:
    if code in (404, 410):
        return "missing-shard"
    if code in (401, 403):
        return "forbidden"
    return "server-error" if code >= 500 or code in (408, 425, 429) else "unreachable"


def _fsspec_chunks(url: str) -> Generator[bytes, None, None]:
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except ImportError as err:
        raise DependencyError(
            f"{url.partition('://')[0]}:// needs a package that is not installed: {err}",
            where=display_url(url),
            fix="install the package that the message names",
        ) from err
    except FileNotFoundError as err:
        raise FetchError("missing-shard", str(err) or "no such file") from err
    except PermissionError as err:
        raise FetchError("forbidden", str(err)) from err
    except TimeoutError as err:
        raise FetchError("timeout", str(err)) from err
    except OSError as err:
        raise FetchError("connection", f"{type(err).__name__}: {err}") from err


def _watched(source: Generator[bytes, None, None], timeout_sec: float) -> Generator[bytes, None, None]:
    """The chunks of `source`, read in a thread, because a file system's read may never come back.

    Raises: FetchError.
    """
    chunks: queue.Queue[bytes | BaseException | None] = queue.Queue(maxsize=2)
    given_up = threading.Event()

    def put(item: bytes | BaseException | None) -> bool:
        while not given_up.is_set():
            try:
                chunks.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for chunk in source:
                if not put(chunk):
                    return
            put(None)
        except BaseException as err:  # handed to the thread that waits
            put(err)

    threading.Thread(target=read, daemon=True, name="evatool-fetch").start()
    try:
        while True:
            try:
                item = chunks.get(timeout=timeout_sec)
            except queue.Empty:
                raise FetchError("timeout", f"no byte in {timeout_sec:g} s") from None
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        given_up.set()
