"""Shards in tars as a source: local or fetched, checked, and never more read than was asked for.

Only members on an allow-list are read, as bytes; nothing in a tar is unpacked, followed or executed.
"""

from __future__ import annotations

import logging
import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from evatool.data.sources.base import Source, UnreadableSample
from evatool.data.sources.cache import RETRY_SEC, ShardCache
from evatool.data.sources.fetch import FetchError, Patience, display_url, is_remote, local_path
from evatool.data.sources.shard_list import ShardList, read_members
from evatool.data.tar.index import ShardMembers

log = logging.getLogger(__name__)

T = TypeVar("T")

LOCAL_WINDOW, REMOTE_WINDOW = 64, 16
"""Shards shuffled together where the recipe does not say: fewer where each has to be fetched."""

TABLE_BYTES = 128 * 2**20
"""Most memory of the tables that say where members lie, per process and source; 10,000 samples take about 1 MiB."""

MAX_OPEN = 256
"""Most tars held open, per process and source."""

MAX_MEMBER_BYTES = 256 * 2**20
"""A larger member is refused by its header."""

MAX_SPAN_BYTES = 2**20
"""Members of a sample that lie within so many bytes are read at once."""


@dataclass
class _Open:
    """A tar that is being read."""

    handle: int
    members: ShardMembers
    fields: Collection[str] | None
    names: list[str | None]
    """Name of each extension, by its number; None where the member is not among `fields`."""
    process: int

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
        self._open: OrderedDict[int, _Open] = OrderedDict()
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
        opened = self._opened(shard)
        if opened.fields is not fields:
            opened.select(fields)
        members, names = opened.members, opened.names
        if number >= len(members):
            found = members.problems[-1] if members.problems else f"only {len(members)} samples"
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
        read = self._patiently(shard, lambda: _read_extents(self._open[shard].handle, extents, are_neighbours))
        for name, (_, size, crc32) in extents.items():
            data = read[name]
            if len(data) != size:
                raise UnreadableSample("truncated-shard", f"the tar ends inside member {name}")
            if crc32 >= 0 and zlib.crc32(data) != crc32:
                raise UnreadableSample("corrupt-member", f"{name} has another checksum than when it was written")
        return read

    def prefetch(self, shards: Sequence[int]) -> None:
        """Begin to fetch those of these shards that are remote."""
        wanted = [self._remote(shard) for shard in shards if is_remote(self.shards.urls[shard])]
        if wanted:
            self.cache.fetch_ahead(wanted)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        for found in getattr(self, "_open", {}).values():
            if found.process == os.getpid():
                os.close(found.handle)

    def _opened(self, shard: int) -> _Open:
        """The shard, opened if it is not; what was not used longest is closed."""
        lost = self._lost.get(shard)
        if lost is not None:
            if time.monotonic() - lost[0] < RETRY_SEC:
                raise lost[1]
            del self._lost[shard]
        found = self._open.get(shard)
        if found is not None and found.process == os.getpid():
            self._open.move_to_end(shard)
            return found
        try:
            found = self._patiently(shard, lambda: self._open_shard(shard))
        except UnreadableSample as err:
            self._lost[shard] = (time.monotonic(), err)
            raise
        self._open[shard] = found
        while len(self._open) > 1 and (
            len(self._open) > MAX_OPEN or sum(o.members.num_bytes for o in self._open.values()) > TABLE_BYTES
        ):
            _, oldest = self._open.popitem(last=False)
            if oldest.process == os.getpid():
                os.close(oldest.handle)
        return found

    def _open_shard(self, shard: int) -> _Open:
        url, size = self.shards.urls[shard], int(self.shards.sizes[shard])
        if is_remote(url):
            remote_url, _, sha256 = self._remote(shard)
            path = self.cache.get(remote_url, size=size, sha256=sha256)
        else:
            path = local_path(url)
        handle = os.open(path, os.O_RDONLY)
        try:
            found = os.fstat(handle).st_size
            has_changed = size >= 0 and found != size
            if has_changed:
                log.warning("%s has %d bytes instead of %d: it is scanned anew", display_url(url), found, size)
            members = read_members(self.shards, shard, path, use_index=not has_changed)
        except BaseException:
            os.close(handle)
            raise
        if len(members) != self.shards.counts[shard]:
            log.warning(
                "%s holds %d samples instead of %d%s",
                display_url(url),
                len(members),
                self.shards.counts[shard],
                "; the others are not read" if len(members) > self.shards.counts[shard] else "",
            )
        return _Open(handle, members, None, [], os.getpid())

    def _remote(self, shard: int) -> tuple[str, int, str | None]:
        return self.shards.urls[shard], int(self.shards.sizes[shard]), self.shards.sha256[shard]

    def _patiently(self, shard: int, once: Callable[[], T]) -> T:
        """Repeat what the file system refuses. Raises: UnreadableSample after the last try."""
        pauses = None
        while True:
            try:
                return once()
            except FetchError as err:  # has had its tries
                raise UnreadableSample(err.cause, err.detail, is_whole_shard=True) from err
            except OSError as err:
                pauses = pauses or self.patience.pauses()
                pause = next(pauses, None)
                if pause is None:
                    cause = "missing-shard" if isinstance(err, FileNotFoundError) else "unreadable"
                    raise UnreadableSample(cause, str(err), is_whole_shard=True) from err
                log.info("%s: %s; again in %.1f s", self.shard_name(shard), err, pause)
                time.sleep(pause)


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
