"""Shards in tars as a source: local or fetched, checked, and never more read than was asked for.

Only members on an allow-list are read, as bytes; nothing in a tar is unpacked, followed or executed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from evatool.data.sources.base import MissingField, Source, UnreadableSample
from evatool.data.sources.cache import RETRY_SEC, ShardCache
from evatool.data.sources.fetch import FetchError, Patience, display_url, is_remote, local_path
from evatool.data.sources.plain_tars import read_members
from evatool.data.sources.shard_list import ShardList
from evatool.data.tar.index import WHOLE_TAR, ShardMembers, scan_file
from evatool.data.tar.open_files import FILES, is_too_many, new_reader, open_for_reading

log = logging.getLogger(__name__)

T = TypeVar("T")

LOCAL_WINDOW, REMOTE_WINDOW = 64, 16
"""Shards shuffled together where the recipe does not say: fewer where each has to be fetched."""

TABLE_BYTES = 128 * 2**20
"""Most memory of the tables that say where members lie, per process and source; 10,000 samples take about 1 MiB."""

MAX_MEMBER_BYTES = 256 * 2**20
"""A larger member is refused by its header."""

MAX_SPAN_BYTES = 2**20
"""Members of a sample that lie within so many bytes are read at once."""

_MAX_LISTED = 20  # members of a sample that a message lists


@dataclass
class _Known:
    """A tar whose members are known; its file may have been closed meanwhile."""

    path: Path
    stamp: tuple[int, int]
    """Size and time of the file that the members were found in."""
    members: ShardMembers
    fields: Collection[str] | None = None
    names: list[str | None] = field(default_factory=list)
    """Name of each extension, by its number; None where the member is not among `fields`."""

    def select(self, fields: Collection[str]) -> None:
        """Let reads give these members and no others."""
        self.fields = fields
        self.names = [name if name in fields else None for name in self.members.extensions]


class TarSource(Source):
    """The samples of shards in tars, local or fetched; members whose names are asked for are read, and no others.

    Args:
        shards: the tars and what is known of them.
        cache: for remote shards.
        patience: with reads that fail.
    """

    def __init__(self, shards: ShardList, cache: ShardCache, patience: Patience) -> None:
        self.shards, self.cache, self.patience = shards, cache, patience
        self.max_pixels, self.decoded_bytes = shards.max_pixels, shards.decoded_bytes
        self.default_window = REMOTE_WINDOW if shards.has_remote else LOCAL_WINDOW
        self.can_prefetch = shards.has_remote
        self._number = new_reader()
        self._known: OrderedDict[int, _Known] = OrderedDict()
        self._lost: dict[int, tuple[float, UnreadableSample]] = {}

    @property
    def name(self) -> str:
        return self.shards.name

    @property
    def num_samples(self) -> int:
        return self.shards.num_samples

    @property
    def shard_counts(self) -> np.ndarray:
        return self.shards.counts

    def describe(self) -> str:
        return f"{self.num_samples} samples in {len(self.shards.urls)} shards"

    def fingerprint(self) -> str:
        """Names and counts of the shards, wherever they lie."""
        return self.shards.digest()

    def content_fingerprint(self) -> str:
        """Names, counts and, as far as they are known, checksums or sizes of the shards."""
        return self.shards.content_digest()

    def key(self, index: int) -> str:
        """The key of a sample; its number in the shard where the shard does not say."""
        shard, number = self.locate(index)
        try:
            members = self._opened(shard).members
        except UnreadableSample:
            return f"#{number}"
        return members.key(number) if number < len(members) else f"#{number}"

    def shard_name(self, shard: int) -> str:
        """Path of a shard, or its URL without credentials."""
        return display_url(self.shards.urls[shard])

    def read(self, index: int, fields: Collection[str]) -> dict[str, bytes]:
        """Members of a sample by extension, of those in `fields`. Raises: UnreadableSample."""
        shard, number = self.locate(index)
        handle = self._acquire(shard)
        try:
            known = self._known[shard]
            self._known.move_to_end(shard)
            if known.fields is not fields:
                known.select(fields)
            extents, are_neighbours = _extents(known, number)
            read = self._patiently(shard, lambda: _read_extents(handle, extents, are_neighbours))
        finally:
            FILES.release((self._number, shard))
        for name, (_, size, crc32) in extents.items():
            data = read[name]
            if len(data) != size:
                raise UnreadableSample("truncated-shard", f"the tar ends inside member {name}")
            if crc32 >= 0 and zlib.crc32(data) != crc32:
                raise UnreadableSample("corrupt-member", f"{name} has another checksum than when it was written")
        return read

    def explain(self, index: int, error: MissingField) -> UnreadableSample:
        """The error with the names of all members, or that the sample's members do not stand together."""
        shard, number = self.locate(index)
        try:
            members = self._opened(shard).members
        except UnreadableSample:
            return error
        names = [name for name, _ in members.members(number)] if number < len(members) else []
        more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
        listed = f"its members: {', '.join(sorted(names)[:_MAX_LISTED])}{more}"
        if number in members.split_samples:
            return UnreadableSample(
                "split-sample", f"{listed}; others of this key stand elsewhere in the tar, which is not sorted"
            )
        return UnreadableSample(error.cause, f"{error.detail}; {listed}")

    def doubt(self, index: int) -> bool:
        """Compare the tar with an index that has no checksum; True where the index was wrong, and is left aside now."""
        shard, _ = self.locate(index)
        known = self._known.get(shard)
        if known is None or known.members.is_verified:
            return False
        known.members.is_verified = True  # once is enough
        try:
            scanned = scan_file(known.path)
        except OSError:
            return False
        if _same_extents(known.members, scanned) and not self._is_intact(shard, known.path):
            return False
        log.warning("%s: its index is damaged; the tar is scanned and read without it", self.shard_name(shard))
        known.members, known.fields = scanned, None
        return True

    def prefetch(self, shards: Sequence[int]) -> None:
        """Begin to fetch those of these shards that are remote."""
        wanted = [self._remote(shard) for shard in shards if is_remote(self.shards.urls[shard])]
        if wanted:
            self.cache.fetch_ahead(wanted)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": OrderedDict(), "_number": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _number=new_reader())

    def __del__(self) -> None:
        if getattr(self, "_number", None) is not None:
            FILES.close([(self._number, shard) for shard in self._known])

    def _opened(self, shard: int) -> _Known:
        """The shard with its members known. Raises: UnreadableSample."""
        if shard not in self._known:
            self._acquire(shard)
            FILES.release((self._number, shard))
        return self._known[shard]

    def _acquire(self, shard: int) -> int:
        """A descriptor of the shard's tar, to be released, whose members are in `_known`. Raises: UnreadableSample."""
        lost = self._lost.get(shard)
        if lost is not None:
            if time.monotonic() - lost[0] < RETRY_SEC:
                raise lost[1]
            del self._lost[shard]
        try:
            handle = self._patiently(
                shard, lambda: FILES.acquire((self._number, shard), lambda: self._open_shard(shard))
            )
        except UnreadableSample as err:
            self._lost[shard] = (time.monotonic(), err)
            raise
        return handle

    def _open_shard(self, shard: int) -> int:
        """Open the tar, and find its members where they are not known of this very file."""
        url, size = self.shards.urls[shard], int(self.shards.sizes[shard])
        if is_remote(url):
            remote_url, _, sha256 = self._remote(shard)
            path = self.cache.get(remote_url, size=size, sha256=sha256)
        else:
            path = local_path(url)
        handle = open_for_reading(path, follows_links=not is_remote(url))
        try:
            stat = os.fstat(handle)
            stamp = (stat.st_size, stat.st_mtime_ns)
            known = self._known.get(shard)
            if known is None or known.stamp != stamp:
                self._known[shard] = _Known(path, stamp, self._find_members(shard, path, stamp[0]))
            self._known.move_to_end(shard)
            self._forget_beyond(TABLE_BYTES)
        except BaseException:
            os.close(handle)
            raise
        return handle

    def _find_members(self, shard: int, path: Path, found: int) -> ShardMembers:
        """The members of a tar of `found` bytes; says so where it is not the one that was promised. Raises: OSError."""
        name, size, count = self.shard_name(shard), int(self.shards.sizes[shard]), int(self.shards.counts[shard])
        has_changed = 0 <= size != found
        if has_changed:
            log.warning("%s has %d bytes instead of %d: it is scanned anew", name, found, size)
        members = read_members(path, None if has_changed else self.shards.indexes[shard], self.shards.keeps_indexes)
        if len(members) != count:
            more = "; the others are not read" if len(members) > count else ""
            log.warning("%s holds %d samples instead of %d%s", name, len(members), count, more)
        return members

    def _forget_beyond(self, num_bytes: int) -> None:
        """Give up the tables of the tars that were not used for longest, down to one."""
        while len(self._known) > 1 and sum(known.members.num_bytes for known in self._known.values()) > num_bytes:
            shard, _ = self._known.popitem(last=False)
            FILES.close([(self._number, shard)])

    def _is_intact(self, shard: int, path: Path) -> bool:
        """True where the whole tar has the checksum that the manifest gives it."""
        expected = self.shards.sha256[shard]
        if expected is None:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == expected

    def _remote(self, shard: int) -> tuple[str, int, str | None]:
        return self.shards.urls[shard], int(self.shards.sizes[shard]), self.shards.sha256[shard]

    def _patiently(self, shard: int, once: Callable[[], T]) -> T:
        """Repeat what the file system refuses. Raises: UnreadableSample after the last try."""
        pauses = None
        while True:
            try:
                return once()
            except (FetchError, OSError) as err:
                if is_too_many(err):
                    if FILES.make_room():
                        continue
                    raise UnreadableSample("too-many-files", str(err), is_whole_shard=True) from err
                if isinstance(err, FetchError):  # has had its tries
                    raise UnreadableSample(err.cause, err.detail, is_whole_shard=True) from err
                pauses = pauses or self.patience.pauses()
                pause = next(pauses, None)
                if pause is None:
                    cause = "missing-shard" if isinstance(err, FileNotFoundError) else "unreadable"
                    raise UnreadableSample(cause, str(err), is_whole_shard=True) from err
                log.info("%s: %s; again in %.1f s", self.shard_name(shard), err, pause)
                time.sleep(pause)


def _extents(known: _Known, number: int) -> tuple[dict[str, list[int]], bool]:
    """Place of each wanted member of a sample, and whether no other member lies between them.

    Raises: UnreadableSample where the sample is not there, or a member is not as it should be.
    """
    members, names = known.members, known.names
    if number >= len(members):
        damage = [problem for problem in members.problems if problem.cause in WHOLE_TAR]
        found = damage[-1] if damage else f"only {len(members)} samples"
        raise UnreadableSample("truncated-shard", f"{found}; sample {number} is not there")
    extents: dict[str, list[int]] = {}
    last, are_neighbours = -1, True
    for row, (i, place) in enumerate(zip(*members.rows(number), strict=True)):
        name = names[i]
        if name is None:
            continue
        are_neighbours = are_neighbours and last in (-1, row - 1)
        last = row
        if name in extents:
            raise UnreadableSample("duplicate-member", f"two members with extension {name}")
        if place[1] > MAX_MEMBER_BYTES:
            raise UnreadableSample("too-large-member", f"{name} of {place[1]} bytes, limit {MAX_MEMBER_BYTES}")
        extents[name] = place
    return extents, are_neighbours


def _same_extents(one: ShardMembers, other: ShardMembers) -> bool:
    """True where two tables say the same of where which member of which sample lies."""
    return len(one) == len(other) and all(
        one.key(number) == other.key(number)
        and [(name, place[:2]) for name, place in one.members(number)]
        == [(name, place[:2]) for name, place in other.members(number)]
        for number in range(len(one))
    )


def _read_extents(handle: int, extents: Mapping[str, Sequence[int]], are_neighbours: bool) -> dict[str, bytes]:
    """The bytes at each (offset, size, ...), which rise; fewer only where the file ends.

    Args:
        are_neighbours: nothing but headers lies between them: they are read at once.
    Raises: OSError.
    """
    if not extents:
        return {}
    ordered = list(extents.values())
    start = ordered[0][0]
    span = ordered[-1][0] + ordered[-1][1] - start
    if not are_neighbours or span > MAX_SPAN_BYTES:
        return {name: _read_at(handle, offset, size) for name, (offset, size, _) in extents.items()}
    data = _read_at(handle, start, span)
    return {name: data[offset - start : offset - start + size] for name, (offset, size, _) in extents.items()}


def _read_at(handle: int, offset: int, size: int) -> bytes:
    """Up to `size` bytes; fewer only at the end of the file. Raises: OSError."""
    data = os.pread(handle, size, offset)
    while 0 < len(data) < size:
        more = os.pread(handle, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data
