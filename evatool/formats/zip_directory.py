"""Where the members of an uncompressed zip archive lie, as torch writes them: no byte of a member is read for it.

Why not `zipfile`: it makes half a kilobyte of each 46 bytes of directory, and inflates what a member makes of itself.
torch compresses nothing but the code of TorchScript, which is not read: a compressed member is refused where its bytes
are asked for, and every declared size is checked against the file.
Source: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT sections 4.3.7, 4.3.12 to 4.3.16 and 4.5.3.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import BinaryIO

from evatool.core.errors import CheckpointError

MAX_MEMBERS = 200_000
MAX_DIRECTORY_BYTES = 16 * 2**20

_END, _END64, _LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_END_BYTES, _LOCATOR_BYTES, _END64_BYTES, _ENTRY_BYTES, _LOCAL_BYTES = 22, 20, 56, 46, 30
_ENTRY = struct.Struct("<4s4B4HL2L5H2L")
_IN_EXTRA = 0xFFFFFFFF  # the true number stands in the zip64 field


@dataclass(frozen=True, slots=True)
class ZipMember:
    """One member: its local header's place in the file, its size, and the checksum of its bytes."""

    header_offset: int
    size: int
    crc: int
    is_packed: bool
    """True where it is compressed or encrypted: its bytes do not stand in the file."""


def read_directory(file: BinaryIO, where: str) -> dict[str, ZipMember]:
    """The members of the archive by name.

    Raises: CheckpointError for what is damaged, or beyond `MAX_MEMBERS` or `MAX_DIRECTORY_BYTES`.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        start, length = _directory_place(file, size)
        if length > MAX_DIRECTORY_BYTES:
            raise CheckpointError(
                f"the archive's directory has {length} bytes",
                where=where,
                expected=f"at most {MAX_DIRECTORY_BYTES}",
                fix="save the state dict alone, with torch.save",
            )
        file.seek(start)
        return _members(file.read(length), size, where)
    except (struct.error, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"the archive is damaged: {error}", where=where, fix="copy or download the file again"
        ) from error


def member_start(file: BinaryIO, member: ZipMember) -> int:
    """The place of a member's first byte: its local header's variable lengths may differ from the directory's.

    Raises: ValueError, struct.error for a place outside of the file and for a compressed member.
    """
    if member.is_packed:
        raise ValueError(f"a member is compressed, to {member.size} bytes, and torch writes it uncompressed")
    file.seek(member.header_offset)
    head = file.read(_LOCAL_BYTES)
    if head[:4] != b"PK\x03\x04":
        raise ValueError("a member does not begin where the directory says")
    name_length, extra_length = struct.unpack_from("<HH", head, 26)
    start = member.header_offset + _LOCAL_BYTES + int(name_length) + int(extra_length)
    if start + member.size > os.fstat(file.fileno()).st_size:
        raise ValueError("a member is longer than the file")
    return start


def _directory_place(file: BinaryIO, size: int) -> tuple[int, int]:
    """(start, bytes) of the central directory."""
    tail_start = max(0, size - _END_BYTES - 0xFFFF)
    file.seek(tail_start)
    tail = file.read(size - tail_start)
    at = tail.rfind(_END)
    if at < 0:
        raise ValueError("its end is missing")
    length, start = struct.unpack_from("<LL", tail, at + 12)
    locator = at - _LOCATOR_BYTES
    if locator >= 0 and tail[locator : locator + 4] == _LOCATOR64:
        (end64,) = struct.unpack_from("<Q", tail, locator + 8)
        if end64 + _END64_BYTES > size:
            raise ValueError("its end is misplaced")
        file.seek(end64)
        head = file.read(_END64_BYTES)
        if head[:4] != _END64:
            raise ValueError("its end is misplaced")
        length, start = struct.unpack_from("<QQ", head, 40)
    if start + length > size:
        raise ValueError("its directory reaches beyond the file")
    return start, length


def _members(directory: bytes, size: int, where: str) -> dict[str, ZipMember]:
    found: dict[str, ZipMember] = {}
    at = 0
    while at + _ENTRY_BYTES <= len(directory):
        fields = _ENTRY.unpack_from(directory, at)
        magic, flags, method, crc, packed, full = (fields[i] for i in (0, 5, 6, 9, 10, 11))
        name_length, extra_length, comment_length, offset = (fields[i] for i in (12, 13, 14, 18))
        if magic != b"PK\x01\x02":
            raise ValueError("its directory is cut")
        extra_start = at + _ENTRY_BYTES + name_length
        name = directory[at + _ENTRY_BYTES : extra_start].decode("utf-8", "replace")
        wide = [number for number in (full, packed, offset) if number == _IN_EXTRA]
        if wide:
            numbers = iter(_wide_numbers(directory[extra_start : extra_start + extra_length], len(wide)))
            full, packed, offset = (next(numbers) if n == _IN_EXTRA else n for n in (full, packed, offset))
        if name in found:
            raise ValueError(f"two members are called {name[:200]!r}")
        is_packed = bool(flags & 1 or method or packed != full)
        if offset + _LOCAL_BYTES + packed > size:
            raise ValueError(f"the member {name[:200]!r} reaches beyond the file")
        if len(found) == MAX_MEMBERS:
            raise CheckpointError(f"the archive has more than {MAX_MEMBERS} members", where=where)
        found[name] = ZipMember(offset, full, crc, is_packed)
        at = extra_start + extra_length + comment_length
    return found


def _wide_numbers(extra: bytes, count: int) -> tuple[int, ...]:
    """The first `count` numbers of a member's zip64 field."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1 and length >= 8 * count and at + 4 + 8 * count <= len(extra):
            return struct.unpack_from(f"<{count}Q", extra, at + 4)
        at += 4 + length
    raise ValueError("a member's size is missing")
