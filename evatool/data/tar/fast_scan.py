"""Runs of ordinary members of a tar, a few thousand headers at a time.

Nearly every header of a data set's tars says one of two things: here is a file with a short name, or here is the time
of the file after me. Such headers are followed by their sizes alone and then judged all at once, several times faster
than one by one; at the first that is anything else the run ends, and `scan` looks at it closely.

Why not webdataset's or Python's tar reader: they read every member to find the next one, and cannot begin at a sample's
number. A sample of 10 kB costs 132.3 us in webdataset, here 16.2 in a first pass and 6.6 after it (docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from evatool.data.tar.header import BLOCK, CHECKSUM, KIND, NAME, PAX, PREFIX, REGULAR, SIZE, SUM_OF_BLANK_CHECKSUM

_HEADERS_AT_ONCE = 512  # their bytes and what is made of them stay in the processor's cache
_STAMP_BYTES = 64  # a record of a time takes about 30
_LOW_BYTES = np.uint64(0x00FF00FF00FF00FF)
_PLAIN, _OLD_PLAIN, _PAX = REGULAR[0], REGULAR[1], PAX[0]
_DIGITS_OF_SIZE = slice(SIZE.start, SIZE.stop - 1)
_NUM_DIGITS = _DIGITS_OF_SIZE.stop - _DIGITS_OF_SIZE.start
_SLASH, _NEWLINE, _SPACE, _ZERO = ord("/"), ord("\n"), ord(" "), ord("0")
_MTIME = np.frombuffer(b" mtime=", dtype=np.uint8)

Read = Callable[[int], bytes]
"""Offset in a tar -> some thousand bytes from there on, at least two blocks but at the tar's end."""

# n headers that were followed


class Run(NamedTuple):
    """Ordinary members, and what follows them."""

    names: list[str]
    offsets: np.ndarray  # (members,) int64, of the data
    sizes: np.ndarray  # (members,) int64
    end: int  # offset of the header after them
    has_more: bool  # the next headers may be ordinary, too


def ordinary_members(read: Read, start: int, num_bytes: int) -> Run:
    """Ordinary members from `start` on, as many as one look takes in.

    A member is ordinary if its header is a regular file's of ustar, GNU or pax with its right checksum, a whole name
    that no one could take for a path outside, and all of its bytes; a pax header before it may give its time.

    Args:
        read: gives some thousand bytes of the tar from an offset on.
        start: offset of a header, a multiple of 512.
        num_bytes: size of the whole tar.
    """
    positions, headers, stamps, following = _followed(read, start, num_bytes)
    nothing = Run([], np.empty(0, np.int64), np.empty(0, np.int64), start, False)
    if not positions:
        return nothing
    where = np.array(positions, dtype=np.int64)
    sizes, is_right = _octal(headers[:, _DIGITS_OF_SIZE])
    is_right &= (headers[:, SIZE.stop - 1] == 0) | (headers[:, SIZE.stop - 1] == _SPACE)
    is_right &= _sums_are_right(headers)
    kinds = headers[:, KIND]
    is_file = is_right & ((kinds == _PLAIN) | (kinds == _OLD_PLAIN)) & _names_are_short(headers)
    is_stamp = is_right & (kinds == _PAX)
    rows = np.flatnonzero(kinds == _PAX)
    is_stamp[rows] &= _are_stamps(stamps, sizes[rows])
    is_stamp[:-1] &= is_file[1:]
    is_stamp[-1] = False  # the file it belongs to was not looked at
    others = np.flatnonzero(~(is_file | is_stamp))
    count = int(others[0]) if len(others) else len(where)
    chosen = np.flatnonzero(is_file[:count])
    names = headers[chosen, NAME].copy().view("S100")[:, 0].tolist()
    joined = b"\0".join(names)
    has_gaps = joined.count(b"\0") != max(0, len(names) - 1)
    if has_gaps or b".." in joined or b"/\0" in joined or joined.endswith(b"/"):
        return nothing
    text = joined.decode("utf-8", "backslashreplace").split("\0") if names else []
    end = following if count == len(where) else positions[count]
    is_whole = count == len(where) or (count == len(where) - 1 and bool(kinds[count] == _PAX))
    return Run(text, where[chosen] + BLOCK, sizes[chosen], end, is_whole and count > 0)


def _followed(read: Read, start: int, num_bytes: int) -> tuple[list[int], np.ndarray, np.ndarray, int]:
    """The blocks that are headers if the sizes in those before them are true.

    Returns: offsets; the headers (n, 512) uint8; the first 64 bytes after each that is a pax header, (p, 64) uint8; the
        offset after them all.
    """
    positions: list[int] = []
    rows: list[int] = []  # offsets of the headers in what was read
    parts: list[bytes] = []
    position, shift, end, window = start, 0, start, b""  # shift: from an offset in the tar to one in what was read
    base, num_read = start, 0
    while len(positions) < _HEADERS_AT_ONCE:
        if position + 2 * BLOCK > end:
            window = read(position)
            window = window[: len(window) // BLOCK * BLOCK]  # a tar may end in the middle of a block
            shift = num_read - position
            num_read += len(window)
            base, end = position, position + len(window)
            parts.append(window)
        at = position - base + SIZE.start
        try:
            size = int(window[at : at + _NUM_DIGITS], 8)
        except ValueError:  # the tar's end, or what only a closer look can tell
            break
        following = position + BLOCK + (size + BLOCK - 1 & -BLOCK)
        if size < 0 or following > num_bytes:
            break
        positions.append(position)
        rows.append(position + shift)
        position = following
    blocks = np.frombuffer(b"".join(parts), dtype=np.uint8).reshape(-1, BLOCK)
    header_rows = np.array(rows, dtype=np.int64) // BLOCK
    headers = blocks[header_rows]
    # Where the tar ends with a header of nothing there is no block after it, and its size of 0 tells.
    following_rows = np.minimum(header_rows[headers[:, KIND] == _PAX] + 1, len(blocks) - 1)
    return positions, headers, blocks[following_rows, :_STAMP_BYTES], position


def _octal(digits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, d) ASCII -> values int64 (n,), and whether every character is an octal digit."""
    values = digits - np.uint8(_ZERO)  # what lies below "0" wraps round to large numbers
    powers = 8 ** np.arange(digits.shape[1] - 1, -1, -1, dtype=np.int64)
    return values.astype(np.int64) @ powers, np.asarray(values.max(axis=1) < 8)


def _sums_are_right(headers: np.ndarray) -> np.ndarray:
    """True for each header (n, 512) uint8 whose checksum is right and written the usual way; (n,) bool."""
    field = headers[:, CHECKSUM]
    stored, is_octal = _octal(field[:, :6])
    #     sum over the block - the field's own bytes + 8 spaces
    words = headers.view(np.uint64)
    # Two bytes apart, 64 words add up to less than 2**16 in each of the four lanes.
    pairs = words >> np.uint64(8)
    pairs &= _LOW_BYTES
    pairs += words & _LOW_BYTES
    lanes = pairs.sum(axis=1, dtype=np.uint64)
    sums = lanes.view(np.uint16).reshape(-1, 4).sum(axis=1, dtype=np.int64)
    sums += SUM_OF_BLANK_CHECKSUM - field.sum(axis=1, dtype=np.int64)
    return np.asarray(is_octal & (field[:, 6] == 0) & (field[:, 7] == _SPACE) & (sums == stored))


def _names_are_short(headers: np.ndarray) -> np.ndarray:
    """True for each name that stands whole in its field, is not empty and does not begin at the root; (n,) bool."""
    first = headers[:, 0]
    is_whole = (headers[:, NAME.stop - 1] == 0) & (headers[:, PREFIX.start] == 0)
    return np.asarray(is_whole & (first != 0) & (first != _SLASH))


def _are_stamps(records: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """True where pax records (n, 64) of these sizes are one record, of a time: `NN mtime=...\\n`; (n,) bool."""
    tens, ones = (records[:, i].astype(np.int64) - _ZERO for i in (0, 1))
    is_digit = (tens >= 1) & (tens <= 9) & (ones >= 0) & (ones <= 9)
    is_end = records == _NEWLINE
    says_size = 10 * tens + ones == sizes
    ends_there = (is_end.argmax(axis=1) == sizes - 1) & is_end.any(axis=1)
    is_short = (sizes > 0) & (sizes <= _STAMP_BYTES)
    is_time = (records[:, 2:9] == _MTIME).all(axis=1)
    return np.asarray(is_short & is_digit & says_size & ends_there & is_time)
