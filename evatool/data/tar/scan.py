"""Tars by their headers alone: where each regular file lies, and what is wrong with the rest.

Nothing is unpacked, followed or executed, and no name in a tar ever becomes a path. Read are ustar headers, GNU long
names and pax records of name and size, as GNU tar, bsdtar, Python and webdataset write them.

Why not `tarfile`: it stops at a damaged header without saying which members it left out, and takes 6.6 times as long:
88 us a header against 13 (9,000 headers in memory, best of 5 by `timeit`).
"""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from evatool.data.tar.fast_scan import Read, ordinary_members
from evatool.data.tar.header import (
    BLOCK,
    CHECKSUM,
    DEVICES,
    DIRECTORY,
    KIND,
    LINKS,
    LONG_LINK,
    LONG_NAME,
    MAGIC,
    NAME,
    OLD_SPARSE_BLOCK_GOES_ON,
    OLD_SPARSE_GOES_ON,
    PAX,
    PAX_GLOBAL,
    PREFIX,
    REGULAR,
    SIZE,
    SPARSE,
    SUM_OF_BLANK_CHECKSUM,
    USTAR,
    is_unsafe_name,
    padded_bytes,
)

MAX_NAME_BYTES = 4096
"""A member whose name is longer is left out: `PATH_MAX` of Linux."""

CAUSES = {
    "empty": "the file has no bytes",
    "compressed": "a compressed file: its members cannot be reached at random; unpack it to a plain .tar",
    "not-a-tar": "the first block is no tar header",
    "truncated": "the tar ends inside a member or a header",
    "damaged-header": "a header's checksum, size or extension is wrong; what follows cannot be found",
    "no-end-mark": "the tar ends without its closing zero block: a writer may have been stopped",
    "data-after-end": "bytes follow the closing zero block: two tars in one file, or a hole",
    "link": "a hard or symbolic link",
    "device": "a device or a pipe",
    "sparse": "a sparse file",
    "unknown-type": "a member of unknown type",
    "unsafe-name": "an absolute name, or one with `..` in it",
    "long-name": f"a name longer than {MAX_NAME_BYTES} bytes",
    "no-name": "a member without a name",
    "no-key": "a name with nothing before a dot, which belongs to no sample: webdataset passes it over, too",
    "split-sample": "a sample whose members do not stand together: the tar is not sorted",
}
"""Values of `TarProblem.cause` and their meaning; those up to "data-after-end" concern the tar, the others a member."""

_MAX_EXTENSION_BYTES = 2**20  # of a long name or pax records; real ones have some hundred
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
_ZERO_BLOCK = bytes(BLOCK)
_WINDOW = 2**13  # bytes looked at together
_WITHOUT_DATA = LINKS + DEVICES + DIRECTORY  # whatever size their header gives
_HEADERS_OF_OTHERS = LONG_NAME + LONG_LINK + PAX_GLOBAL + PAX

Buffer = bytes | bytearray | memoryview | mmap.mmap


class Member(NamedTuple):
    """A regular file of a tar: its name, and `size` bytes from `offset` of the tar."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class TarProblem:
    """A fault in a tar.

    Attributes:
        cause: a key of `CAUSES`.
        name: the member's name or the sample's key, where one is known.
        offset: where it is: a header's, or of "no-key" and "split-sample" the data's of the first member.
        count: how many there are of the cause, where one problem stands for all of them.
    """

    cause: str
    name: str
    offset: int
    count: int = 1

    def __str__(self) -> str:
        others = f", {self.count} of this kind" if self.count > 1 else ""
        return f"{self.cause} at byte {self.offset}{f' ({self.name[:200]})' if self.name else ''}{others}"


@dataclass
class TarScan:
    """Regular files in the order of the tar, a column each of what `Member` has, and what could not be used."""

    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    problems: list[TarProblem] = field(default_factory=list)

    @property
    def members(self) -> list[Member]:
        """The regular files."""
        return list(map(Member, self.names, self.offsets, self.sizes))

    def add(self, names: Iterable[str], offsets: Iterable[int], sizes: Iterable[int]) -> None:
        """Append regular files."""
        self.names += names
        self.offsets += offsets
        self.sizes += sizes


class _DamagedHeader(Exception):
    """A header, or an extension of one, that makes no sense."""


@dataclass
class _Extension:
    """Facts from a long-name or pax header on the member after it, or from a global pax header on all that follow."""

    name: bytes | None = None
    size: int | None = None
    is_sparse: bool = False
    is_too_long: bool = False


def scan_tar(buffer: Buffer, read: Read | None = None) -> TarScan:
    """Walk the headers of a tar. Everything whole before a damage is kept; directories are passed over.

    A name's bytes that are no UTF-8 appear as `\\xff`, so that every name can be written to a log or an index.

    Args:
        buffer: the tar; of an `mmap` only the pages that hold headers are read.
        read: a quicker way to the same bytes.
    Returns: members and problems, whatever the buffer holds.
    """
    scan = TarScan()
    if len(buffer) == 0:
        scan.problems.append(TarProblem("empty", "", 0))
        return scan
    walk = _Walk(buffer, scan, read)
    try:
        walk.run()
    except (_DamagedHeader, ValueError):
        cause = "damaged-header"
        if walk.position == 0:
            cause = "compressed" if bytes(buffer[:6]).startswith(_COMPRESSED) else "not-a-tar"
        scan.problems.append(TarProblem(cause, "", walk.position))
    return scan


class _Walk:
    """One pass over the headers. `position` is the offset of the header looked at."""

    def __init__(self, buffer: Buffer, scan: TarScan, read: Read | None) -> None:
        self.buffer = buffer if isinstance(buffer, bytes | mmap.mmap) else _Sliced(buffer)
        self.end, self.scan = len(buffer), scan
        self.position = self._ordinary(read or (lambda start: self.buffer[start : start + _WINDOW]))
        self.extension, self.defaults = _Extension(), _Extension()
        self.is_extended = False

    def run(self) -> None:
        """Fill the scan. Raises: _DamagedHeader or ValueError for the header at `position`."""
        position = self.position
        while position + BLOCK <= self.end:
            self.position = position
            header = self.buffer[position : position + BLOCK]
            if header == _ZERO_BLOCK:
                if not _is_zero(self.buffer, position):
                    self._report("data-after-end", b"")
                return
            self._check_sum(header)
            name = header[NAME].partition(b"\0")[0]
            position = self._step(header, name, position + BLOCK, _number(header[SIZE]))
            if position < 0:
                return
        self.position = min(position, self.end)
        self._report("no-end-mark" if _is_zero(self.buffer, self.position) else "truncated", b"")

    def _ordinary(self, read: Read) -> int:
        """Members up to the first header that is not ordinary; its offset."""
        position, has_more = 0, True
        while has_more:
            run = ordinary_members(read, position, self.end)
            self.scan.add(run.names, run.offsets.tolist(), run.sizes.tolist())
            position, has_more = run.end, run.has_more
        return position

    def _check_sum(self, header: bytes) -> None:
        """Raises: _DamagedHeader, ValueError unless the checksum is that of the header with its field as spaces."""
        field = header[CHECKSUM]
        stored = _number(field)
        # Adler-32's low half is 1 + the sum of the bytes modulo 65521: C speed, for a sum that takes 17 bits at most.
        expected = (stored + sum(field) - SUM_OF_BLANK_CHECKSUM + 1) % 65521
        if zlib.adler32(header) & 0xFFFF == expected:
            return
        plain = header[: CHECKSUM.start] + header[CHECKSUM.stop :]  # some old writers summed signed bytes
        if stored != sum(plain) + SUM_OF_BLANK_CHECKSUM - 256 * sum(byte > 127 for byte in plain):
            raise _DamagedHeader

    def _step(self, header: bytes, name: bytes, data: int, size: int) -> int:
        """Handle a header of any kind; returns the offset of the next one, -1 where the tar ends inside this one."""
        if size < 0:
            raise _DamagedHeader
        kind, extension = header[KIND], self.extension
        # Tars older than ustar write directories so. A long name is cut in its header, and that may be at a slash.
        is_cut = extension.name is not None or extension.is_too_long
        if kind in REGULAR and not is_cut and name.endswith(b"/"):
            kind = DIRECTORY[0]
        if extension.size is not None and kind not in _HEADERS_OF_OTHERS:
            size = extension.size
        if kind in _WITHOUT_DATA:
            size = 0
        following = data + padded_bytes(size)
        if kind in SPARSE:
            following += self._sparse_map_bytes(header, data)
        if data + size > self.end:
            self._report("truncated", self._full_name(header, name))
            return -1
        if kind in _HEADERS_OF_OTHERS:
            payload = self.buffer[data : data + min(size, _MAX_EXTENSION_BYTES + 1)]
            self._read_extension(kind, payload)
            return following
        full_name = self._full_name(header, name)
        cause = _cause(kind, full_name, extension.is_sparse or self.defaults.is_sparse, extension.is_too_long)
        if cause is not None:
            self._report(cause, full_name)
        elif kind != DIRECTORY[0]:
            self.scan.add([full_name.decode("utf-8", "backslashreplace")], [data], [size])
        self.extension = _Extension()
        self.is_extended = self.defaults.name is not None or self.defaults.is_sparse
        return following

    def _full_name(self, header: bytes, name: bytes) -> bytes:
        long_name = self.extension.name if self.extension.name is not None else self.defaults.name
        if long_name is not None:
            return long_name
        # GNU's magic is "ustar  ", and it keeps times where ustar keeps the first part of a long name.
        prefix = header[PREFIX].partition(b"\0")[0] if header[MAGIC] == USTAR else b""
        return prefix + b"/" + name if prefix else name

    def _read_extension(self, kind: int, payload: bytes) -> None:
        self.is_extended = True
        target = self.defaults if kind in PAX_GLOBAL else self.extension
        if kind in LONG_LINK:
            return
        if len(payload) > _MAX_EXTENSION_BYTES:
            target.is_too_long = True
        elif kind in LONG_NAME:
            target.name = payload.partition(b"\0")[0]
        else:
            _read_pax(payload, target)

    def _sparse_map_bytes(self, header: bytes, data: int) -> int:
        """Bytes of the blocks that go on with an old GNU sparse map, between header and data."""
        start, is_continued = data, header[OLD_SPARSE_GOES_ON]
        while is_continued:
            block = self.buffer[data : data + BLOCK]
            if len(block) < BLOCK:
                break
            is_continued, data = block[OLD_SPARSE_BLOCK_GOES_ON], data + BLOCK
        return data - start

    def _report(self, cause: str, name: bytes) -> None:
        shown = name[:MAX_NAME_BYTES].decode("utf-8", "backslashreplace")
        self.scan.problems.append(TarProblem(cause, shown, self.position))


class _Sliced:
    """A buffer whose slices are `bytes`, as those of `bytes` and `mmap` are."""

    def __init__(self, buffer: bytearray | memoryview) -> None:
        self.view = memoryview(buffer).cast("B")

    def __len__(self) -> int:
        return len(self.view)

    def __getitem__(self, place: slice) -> bytes:
        return self.view[place].tobytes()


def _cause(kind: int, name: bytes, is_sparse: bool, is_too_long: bool) -> str | None:
    """Why a member is left out; None for one that is kept, and for directories."""
    if kind in DIRECTORY:
        return None
    for kinds, cause in ((LINKS, "link"), (DEVICES, "device"), (SPARSE, "sparse")):
        if kind in kinds:
            return cause
    if kind not in REGULAR:
        return "unknown-type"
    if is_sparse:
        return "sparse"
    if is_too_long or len(name) > MAX_NAME_BYTES:
        return "long-name"
    if not name:
        return "no-name"
    if is_unsafe_name(name):
        return "unsafe-name"
    return None


def _number(field: bytes) -> int:
    """A number of a header: octal digits, or base 256 after a set top bit. Raises: ValueError, _DamagedHeader."""
    if field[0] & 0x80:
        value = int.from_bytes(field[1:], "big") + ((field[0] & 0x7F) << 8 * (len(field) - 1))
        if field[0] & 0x40:
            raise _DamagedHeader  # negative
        return value
    value = int(field.partition(b"\0")[0].strip() or b"0", 8)
    if value < 0:
        raise _DamagedHeader
    return value


def _read_pax(payload: bytes, target: _Extension) -> None:
    """Records `LENGTH KEY=VALUE\\n` of name, size and sparseness. Raises: ValueError, _DamagedHeader."""
    start = 0
    while start < len(payload) and payload[start]:
        space = payload.find(b" ", start, start + 20)
        if space < 0:
            raise _DamagedHeader
        end = start + int(payload[start:space])
        if end <= space or end > len(payload) or payload[end - 1 : end] != b"\n":
            raise _DamagedHeader
        key, equals, value = payload[space + 1 : end - 1].partition(b"=")
        if not equals:
            raise _DamagedHeader
        if key == b"path":
            if b"\0" in value:
                raise _DamagedHeader
            target.name = value
        elif key == b"size":
            target.size = int(value)
            if target.size < 0:
                raise _DamagedHeader
        elif key.startswith(b"GNU.sparse."):
            target.is_sparse = True
        start = end


def _is_zero(buffer: bytes | mmap.mmap | _Sliced, start: int) -> bool:
    step = 2**20
    return not any(buffer[i : i + step].strip(b"\0") for i in range(start, len(buffer), step))
