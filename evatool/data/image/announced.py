"""What the bytes of an image announce, read before a decoder sees them: sizes, tags and texts that cost too much.

Pillow reads every tag of a TIFF, every text of a PNG and every comment of a GIF on opening, each as long as it says,
and some of them again for each place that names them. Here they are added up first. See docs/limits.md.
The layouts are those of ITU-T T.81 annex B, TIFF 6.0 section 2, PNG section 5 and GIF89a sections 18 to 25.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

MAX_TAG_VALUES = 2**18
MAX_TEXT_CHUNKS = 16
MAX_CHUNKS = 100_000
MAX_EXTENSION_BYTES = 2**20
_UNPACKED_BYTES = 2**20

_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15; the three others are tables
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})
_TAG_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_RAW_TAGS = frozenset({1, 2, 6, 7})


@dataclass(frozen=True)
class JpegFrame:
    """The frame of a JPEG, by its headers up to the first scan."""

    width: int
    height: int
    components: int
    num_blocks: int
    """Blocks of 8 by 8 values over all components."""
    is_progressive: bool
    is_buffered: bool
    """True where all coefficients are kept before the first pixel: several scans."""
    has_restarts: bool
    scan_start: int
    """Where the first scan's data begin."""

    @property
    def least_bytes(self) -> int:
        """Bytes of data that a whole image has at least: a bit a block in the first of several scans, else two."""
        return self.num_blocks // 8 if self.is_buffered else self.num_blocks // 4

    @property
    def coefficient_bytes(self) -> int:
        """Memory for the coefficients of all blocks, where they are kept."""
        return 128 * self.num_blocks if self.is_buffered else 0


def jpeg_frame(data: bytes) -> JpegFrame | None:
    """What a JPEG's headers say; None where they are not whole."""
    at, has_restarts = 2, False
    found: tuple[int, int, int, list[int]] | None = None
    is_progressive = False
    while at + 4 <= len(data):
        if data[at] != 0xFF:  # libjpeg, too, looks for the next marker
            at = data.find(b"\xff", at)
            if at < 0:
                return None
            continue
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker in _WITHOUT_LENGTH:
            at += 2
            continue
        body = data[at + 4 : at + 2 + length]
        if marker in _FRAME_HEADERS and len(body) >= 6:
            height, width, count = struct.unpack_from(">HHB", body, 1)
            found = (width, height, count, list(body[7 : 6 + 3 * count : 3]))
            is_progressive = marker in _PROGRESSIVE
        elif marker == 0xDD:
            has_restarts = body[:2] != b"\0\0"
        elif marker == 0xDA:
            return _frame(found, is_progressive, body[:1], has_restarts, at + 2 + length)
        at += 2 + length
    return None


def _frame(
    found: tuple[int, int, int, list[int]] | None, is_progressive: bool, scan: bytes, has_restarts: bool, start: int
) -> JpegFrame | None:
    if found is None or not scan:
        return None
    width, height, components, samplings = found
    wide = max((s >> 4 for s in samplings), default=1) or 1
    high = max((s & 15 for s in samplings), default=1) or 1
    blocks = sum(
        -(-width * (s >> 4) // (8 * wide)) * -(-height * (s & 15) // (8 * high)) for s in samplings
    )  # of each component, at its share of the frame's sampling
    is_buffered = is_progressive or scan[0] < components
    return JpegFrame(width, height, components, blocks, is_progressive, is_buffered, has_restarts, start)


def without_exif(data: bytes) -> bytes:
    """A JPEG without its EXIF segments: Pillow would read their tags for a resolution that nothing here uses."""
    at, kept, begin = 2, [], 0
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        if data[at + 1] == 0xFF or data[at + 1] in _WITHOUT_LENGTH:
            at += 1 if data[at + 1] == 0xFF else 2
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] == 0xE1 and data[at + 4 : at + 8] == b"Exif":
            kept.append(data[begin:at])
            begin = end
        at = end
    return b"".join([*kept, data[begin:]]) if begin else data


def excess(data: bytes) -> str | None:
    """Why opening a TIFF, PNG or GIF would cost too much; None where it would not, or where it is another format."""
    try:
        if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return _tiff_excess(data)
        if data[:8] == b"\x89PNG\r\n\x1a\n":
            return _png_excess(data)
        if data[:6] in (b"GIF87a", b"GIF89a"):
            return _gif_excess(data)
    except (struct.error, IndexError):
        pass  # it ends early: the decoder says so
    return None


def _tiff_excess(data: bytes) -> str | None:
    """Tags that hold more than the file does: each may name the same bytes."""
    order, is_big = "<" if data[:1] == b"I" else ">", data[2:4] in (b"+\0", b"\0+")
    count_code, entry_code, next_code = ("Q", "HHQQ", "Q") if is_big else ("H", "HHLL", "L")
    (at,) = struct.unpack_from(order + next_code, data, 8 if is_big else 4)
    entry_bytes, total, seen = struct.calcsize(order + entry_code), 0, set()
    while at and at not in seen:
        seen.add(at)
        (count,) = struct.unpack_from(order + count_code, data, at)
        at += struct.calcsize(order + count_code)
        if count > MAX_CHUNKS or len(seen) > 1000:
            return f"{count} tags in directory {len(seen)}"
        for _ in range(count):
            _, kind, values, _ = struct.unpack_from(order + entry_code, data, at)
            total += _TAG_BYTES.get(kind, 0) * values
            at += entry_bytes
            if total > len(data) or (kind not in _RAW_TAGS and values > MAX_TAG_VALUES):
                return f"tags of {total} bytes, one of {values} values, in a file of {len(data)}"
        (at,) = struct.unpack_from(order + next_code, data, at)
    return None


def _png_excess(data: bytes) -> str | None:
    """Texts and profiles, which are kept unpacked."""
    at, chunks, texts = 8, 0, 0
    while at + 8 <= len(data):
        (length,) = struct.unpack_from(">L", data, at)
        kind = data[at + 4 : at + 8]
        chunks += 1
        texts += kind in (b"zTXt", b"iTXt", b"tEXt", b"iCCP")
        if chunks > MAX_CHUNKS or texts > MAX_TEXT_CHUNKS:
            return f"{texts} texts in {chunks} chunks"
        at += 12 + length
    return None


def png_ends_early(data: bytes) -> bool:
    """True where a PNG's unpacked data are less than its rows: counted without keeping them."""
    width, height, depth, kind = struct.unpack_from(">LLBB", data, 16)
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(kind, 1)
    left = height * -(-width * depth * channels // 8)
    unpack, at = zlib.decompressobj(), 8
    while at + 8 <= len(data) and left > 0:
        (length,) = struct.unpack_from(">L", data, at)
        if data[at + 4 : at + 8] == b"IDAT":
            piece = data[at + 8 : at + 8 + length]
            while piece and left > 0:
                left -= len(unpack.decompress(piece, _UNPACKED_BYTES))
                piece = unpack.unconsumed_tail
        at += 12 + length
    return bool(left > 0)


def webp_ends_early(data: bytes) -> bool:
    """True where a lossy WebP has fewer bits than its blocks of 16 x 16 pixels need, whatever they show.

    A block's two modes are coded with fixed probabilities, the likeliest of which are 145 and 142 of 256: 0.82 and 0.85
    bits. A lossless one may need no bit at all for a pixel.
    Source: https://www.rfc-editor.org/rfc/rfc6386#section-11.2
    """
    if data[12:16] != b"VP8 " or data[23:26] != b"\x9d\x01\x2a":
        return False
    width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    return bool(8 * len(data) < 1.6 * -(-width // 16) * -(-height // 16))


def _gif_excess(data: bytes) -> str | None:
    """Comments and other extensions before the second frame."""
    at = 13 + (3 * 2 ** ((data[10] & 7) + 1) if data[10] & 0x80 else 0)
    extensions = frames = 0
    while at < len(data) and frames < 2:
        begin, kind = at, data[at]
        if kind == 0x2C:
            frames += 1
            at += 11 + (3 * 2 ** ((data[at + 9] & 7) + 1) if data[at + 9] & 0x80 else 0)
        elif kind == 0x21:
            at += 2
        else:
            at += 1  # Pillow looks for the next block as well
            continue
        while data[at]:
            at += 1 + data[at]
        at += 1
        extensions += at - begin if kind == 0x21 else 0
        if extensions > MAX_EXTENSION_BYTES:
            return f"comments of more than {MAX_EXTENSION_BYTES} bytes"
    return None
