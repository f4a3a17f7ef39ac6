"""Tars that are read from their first byte to their last: the output of a command, compressed files, what cannot seek.

A command is run by webdataset's own opener, through a shell, and only where the recipe itself names it and allows it.
URLs are fetched like any shard. The tars are read by Python's `tarfile` in its streaming mode, grouped by the rule of
`evatool.data.tar.index`; what a header may claim is bounded before it is believed.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import io
import logging
import lzma
import os
import re
import select
import subprocess
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from evatool.core.errors import DataError
from evatool.data.sources.base import Fields, SequentialSource, UnreadableSample
from evatool.data.sources.braces import expand_braces
from evatool.data.sources.cache import ShardCache
from evatool.data.sources.fetch import FetchError, display_url, is_remote, local_path
from evatool.data.sources.shard_list import expand
from evatool.data.sources.tar_source import MAX_MEMBER_BYTES
from evatool.data.tar.index import split_name
from evatool.data.tar.open_files import open_for_reading

log = logging.getLogger(__name__)

PIPE = "pipe:"
"""Begins a spec that is a command."""

MAX_HEADER_BYTES = 4 * 2**20
"""Most bytes between two members: padding, long names and pax records."""

DECODING_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)
"""Exceptions of `tarfile` and of the decompressors at damaged bytes."""

_READ_BYTES = 2**16
_END_SEC = 10.0  # for a command whose output has been read
_IGNORED_STATUS = frozenset({0, 141, -13})  # the last two: the reader had enough
_LIST_OR_RANGE = re.compile(r"\{(?:\d+\.\.\d+|[^{}]*,[^{}]*)\}")


@dataclass
class TarStream(SequentialSource):
    """The samples of tars that are read one after the other.

    Args:
        name: the source's.
        specs: a command behind "pipe:", or paths, globs and URLs.
        given_samples: samples of one reading; None counts them by reading everything once, on every rank.
        cache: for URLs.
        max_wait_sec: seconds without a byte after which a command counts as hanging.
    Raises: DataError where the stream cannot be read when its samples are to be counted, or has none.
    """

    label: str
    specs: Sequence[str]
    given_samples: int | None
    cache: ShardCache
    max_wait_sec: float

    def __post_init__(self) -> None:
        self.is_pipe = self.specs[0].startswith(PIPE)
        self.urls = _commands(self.specs[0]) if self.is_pipe else [url for spec in self.specs for url in expand(spec)]
        if not self.urls:
            raise DataError(f"source {self.label!r} names no shard", where=", ".join(self.specs))
        self._num_samples = self.given_samples or self._count()

    @property
    def name(self) -> str:
        return self.label

    @property
    def num_samples(self) -> int:
        return self._num_samples

    def describe(self) -> str:
        what = "outputs of commands" if self.is_pipe else "tars"
        return f"{self.num_samples} samples of {len(self.urls)} {what}"

    def fingerprint(self) -> str:
        named = self.urls if self.is_pipe else [url.rpartition("/")[2] for url in self.urls]
        text = "\0".join([str(self.num_samples), *named])
        return f"stream {hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"

    def open(self) -> Iterator[tuple[str, Fields]]:
        for url in self.urls:
            where = self._shown(url)
            with contextlib.ExitStack() as stack:
                try:
                    raw = stack.enter_context(self._opened(url))
                    yield from read_samples(raw)
                except FetchError as err:
                    raise UnreadableSample(err.cause, f"{where}: {err.detail}", is_whole_shard=True) from err
                except TimeoutError as err:
                    raise UnreadableSample("timeout", f"{where}: {err}", is_whole_shard=True) from err
                except DECODING_ERRORS as err:
                    raise UnreadableSample("stream-failed", f"{where}: {err}", is_whole_shard=True) from err

    def _count(self) -> int:
        log.info("source %s: its samples are counted by reading it once; num_samples would spare that", self.label)
        try:
            found = sum(1 for _ in self.open())
        except UnreadableSample as err:
            raise DataError(
                f"source {self.label!r} cannot be read: {err.detail}",
                where=", ".join(map(self._shown, self.urls[:5])),
                expected="a tar, plain or compressed by gzip, bzip2 or xz",
                fix="try the command in a shell"
                if self.is_pipe
                else "copy the file again, or unpack it to a plain tar",
            ) from err
        if not found:
            raise DataError(f"source {self.label!r} holds no samples", where=", ".join(map(self._shown, self.urls[:5])))
        return found

    def _shown(self, url: str) -> str:
        return f"the command {url!r:.200}" if self.is_pipe else display_url(url)

    def _opened(self, url: str) -> contextlib.AbstractContextManager[Any]:
        if self.is_pipe:
            return _Command(url, self.max_wait_sec)
        path = self.cache.get(url) if is_remote(url) else local_path(url)
        return os.fdopen(open_for_reading(path), "rb")


def read_samples(raw: Any) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members of each sample of a tar.

    A member that stands twice in a sample, or is too large, comes as no bytes: where it is read, the sample is bad.

    Args:
        raw: gives the bytes of a tar, plain or compressed, by `read`.
    Raises: tarfile.TarError, OSError, EOFError, ValueError, zlib.error or lzma.LZMAError where it is damaged.
    """
    bounded = _Bounded(_decompressed(raw))
    last: str | None = None
    fields: dict[str, bytes] = {}
    bounded.left = MAX_HEADER_BYTES
    with tarfile.open(fileobj=bounded, mode="r|", encoding="utf-8", errors="backslashreplace") as tar:  # type: ignore[call-overload]
        for member in tar:
            named = split_name(member.name) if member.isreg() and not member.issparse() else None
            if named is not None:
                key, extension = named
                if key != last:
                    if last is not None:
                        yield last, fields
                    last, fields = key, {}
                is_usable = extension not in fields and member.size <= MAX_MEMBER_BYTES
                bounded.left = member.size + MAX_HEADER_BYTES
                file = tar.extractfile(member) if is_usable else None
                fields[extension] = file.read() if file is not None else b""
            bounded.left = member.size + MAX_HEADER_BYTES
            tar.members = []  # else they are all kept
    if last is not None:
        yield last, fields


_MAX_READS_AT_END = 4


class _Bounded:
    """Bytes of a file, of which no more are given than the next header or member may take."""

    def __init__(self, file: Any) -> None:
        self.file, self.left, self._ends = file, 0, 0

    def read(self, size: int) -> bytes:
        data: bytes = self.file.read(size)
        self.left -= len(data)
        # tarfile looks for the next header after a member of any size, in as many reads as the header claims.
        self._ends = self._ends + 1 if not data and size > 0 else 0
        if self._ends > _MAX_READS_AT_END:
            raise tarfile.ReadError("it ends within a member")
        if self.left < 0:
            raise tarfile.ReadError("a header claims more than is read")
        return data


class _Rest(io.RawIOBase):
    """A file of which the first bytes have been read already."""

    def __init__(self, start: bytes, file: Any) -> None:
        self._start, self._file = start, file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._start[: len(buffer)] if self._start else self._file.read(len(buffer))
        self._start = self._start[len(data) :] if self._start else b""
        buffer[: len(data)] = data
        return len(data)


def _decompressed(raw: Any) -> Any:
    """The bytes of a tar, decompressed where its first bytes say so."""
    start = b""
    while len(start) < 6 and (more := raw.read(6 - len(start))):
        start += more
    rest = io.BufferedReader(_Rest(start, raw), _READ_BYTES)
    if start.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=rest)
    if start.startswith(b"BZh"):
        return bz2.BZ2File(rest)
    if start.startswith(b"\xfd7zXZ\x00"):
        return lzma.LZMAFile(rest)
    if start.startswith((b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")):
        raise tarfile.ReadError("compressed by zstd or lz4, which is not read: unpack it to a plain tar")
    return rest


class _Command:
    """The output of a shell command, by webdataset's opener; ended when it is no longer read."""

    def __init__(self, command: str, max_wait_sec: float) -> None:
        self.command, self.max_wait_sec = command, max_wait_sec

    def __enter__(self) -> _Command:
        from webdataset.gopen import gopen

        self._pipe = gopen(PIPE + self.command, "rb")
        self._process: subprocess.Popen[bytes] = self._pipe.proc
        self._output: IO[bytes] = self._pipe.stream
        return self

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; none at the end. Raises: TimeoutError, OSError where the command failed."""
        ready, _, _ = select.select([self._output], [], [], self.max_wait_sec)
        if not ready:
            raise TimeoutError(f"no byte in {self.max_wait_sec:g} s")
        data = os.read(self._output.fileno(), min(size, _READ_BYTES))
        if not data:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self._process.wait(_END_SEC)
                if status not in _IGNORED_STATUS:
                    raise OSError(f"exit code {status}")
        return data

    def __exit__(self, *_: object) -> None:
        self._output.close()
        try:
            self._process.wait(0.1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _commands(spec: str) -> list[str]:
    """The commands of a spec behind "pipe:"; lists and ranges in braces are taken apart, as webdataset does."""
    command = spec.removeprefix(PIPE)
    # Any other brace is the shell's, or awk's.
    is_list = _LIST_OR_RANGE.sub("", command).count("{") == 0
    return list(expand_braces(command)) if is_list else [command]
