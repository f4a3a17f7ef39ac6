"""The header block of a tar member: where its fields stand, and the kinds of members there are.

Both readers of headers use this one description: `scan` looks at one header closely, `fast_scan` at many at once.

    byte  0     100    124   136    148       156   157   257    263    345     500  512
          | name | ...  | size | mtime | checksum | kind | link | magic | ... | prefix | 0 |

Numbers are octal digits in ASCII, ended by a space or a zero byte. The checksum is the sum of all bytes of the block,
with the eight bytes of its own field taken as spaces. The data follow in whole blocks; the next header stands behind.
Source: POSIX pax, "ustar Interchange Format", https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html; GNU
tar, "Basic Tar Format", https://www.gnu.org/software/tar/manual/html_node/Standard.html.
"""

from __future__ import annotations

BLOCK = 512
"""Tars are made of blocks of this many bytes."""

NAME = slice(0, 100)
SIZE = slice(124, 136)
CHECKSUM = slice(148, 156)
KIND = 156
MAGIC = slice(257, 263)
PREFIX = slice(345, 500)
"""The first part of a name that does not fit `NAME`; GNU tar keeps times here, and has another magic."""

USTAR = b"ustar\0"
"""`MAGIC` of headers whose `PREFIX` belongs to the name."""

OLD_SPARSE_GOES_ON, OLD_SPARSE_BLOCK_GOES_ON = 482, 504
"""Offsets, in a header of an old GNU sparse file and in a further block of its map, of the byte that is not 0 where
another block of the map follows."""

REGULAR = b"0\x007"
"""Kinds of regular files: "0", a zero byte in old tars, and "7", a contiguous file that is stored like the rest."""
LINKS, DEVICES, SPARSE, DIRECTORY = b"12", b"346", b"S", b"5"
LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL = b"L", b"K", b"xX", b"g"
"""Kinds of headers that say something of the member after them; a global one says it of all that follow."""

SUM_OF_BLANK_CHECKSUM = 8 * ord(" ")
"""Share of the checksum's own field, taken as spaces, in the checksum."""


def padded_bytes(size: int) -> int:
    """Bytes that `size` bytes of data take in a tar: whole blocks."""
    return (size + BLOCK - 1) // BLOCK * BLOCK


def is_unsafe_name(name: bytes) -> bool:
    """True for a name that someone could take for a path outside the folder that a tar is unpacked to."""
    return name.startswith(b"/") or b".." in name.replace(b"\\", b"/").split(b"/")
