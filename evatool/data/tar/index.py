"""The samples of one tar: which members each has and where they lie, a hundred bytes a sample.

A sample is a run of members with one key, as webdataset has it: the key is the path up to the first dot of its last
component, the rest in lower case is the extension.
"""

from __future__ import annotations

import json
import mmap
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evatool.data.tar.scan import CAUSES, TarProblem, TarScan, scan_tar

WHOLE_TAR = frozenset(list(CAUSES)[: list(CAUSES).index("link")]) - {"no-end-mark"}
"""Problems that can cost samples after them; the others cost one member, or nothing."""


class Place(NamedTuple):
    """Where a member lies in its tar; `crc32` of its bytes, -1 where it is not known."""

    offset: int
    size: int
    crc32: int = -1


@dataclass
class ShardMembers:
    """The samples of a tar in its order.

    Attributes:
        problems: headers and members that could not be used, in the order of the tar.
    """

    key_ends: np.ndarray  # (samples,) int64: ends of the keys in `key_bytes`
    key_bytes: bytes
    starts: np.ndarray  # (samples + 1,) int32: first member of each sample
    extension_ids: np.ndarray  # (members,) uint16
    extensions: list[str]
    extents: np.ndarray  # (members, 3) int64: offset, size, crc32
    problems: list[TarProblem]

    def __len__(self) -> int:
        return len(self.key_ends)

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        arrays = (self.key_ends, self.starts, self.extension_ids, self.extents)
        return len(self.key_bytes) + sum(array.nbytes for array in arrays)

    def key(self, number: int) -> str:
        """Key of a sample."""
        start = int(self.key_ends[number - 1]) if number else 0
        return self.key_bytes[start : int(self.key_ends[number])].decode("utf-8", "surrogatepass")

    def members(self, number: int) -> list[tuple[str, Place]]:
        """Extensions and places of a sample's members, in the order of the tar; an extension may come twice."""
        ids, extents = self.rows(number)
        return [(self.extensions[i], Place(*place)) for i, place in zip(ids, extents, strict=True)]

    def rows(self, number: int) -> tuple[list[int], list[list[int]]]:
        """A sample's members as plain numbers: indices into `extensions`, and offset, size and crc32 of each."""
        first, last = self.starts[number : number + 2].tolist()
        return self.extension_ids[first:last].tolist(), self.extents[first:last].tolist()


def scan_file(path: Path) -> ShardMembers:
    """The samples of a tar by its headers. Raises: OSError."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return group_members(scan_tar(b""))
        handle = file.fileno()
        with mmap.mmap(handle, 0, access=mmap.ACCESS_READ) as mapped:
            # Reading costs less than the page faults of the mapping, whose pages few headers share.
            return group_members(scan_tar(mapped, lambda start: os.pread(handle, _HEADERS_BYTES, start)))


def group_members(scan: TarScan) -> ShardMembers:
    """Members of a tar, in its order, as samples."""
    keys: list[bytes] = []
    starts: list[int] = []
    ids: list[int] = []
    known: dict[str, int] = {}
    last = None
    for name in scan.names:  # without calls: once a member of a new plain tar
        dot = name.find(".", name.rfind("/") + 1)
        key, extension = (name[:dot], name[dot + 1 :].lower()) if dot >= 0 else (name, "")
        if key != last:
            keys.append(key.encode("utf-8", "surrogatepass"))
            starts.append(len(ids))
            last = key
        number = known.get(extension)
        if number is None:
            number = known[extension] = len(known)
        ids.append(number)
    extents = np.full((len(ids), 3), -1, dtype=np.int64)
    extents[:, 0], extents[:, 1] = scan.offsets, scan.sizes
    return _table(keys, [*starts, len(ids)], ids, list(known), extents, scan.problems)


def read_index(path: Path) -> ShardMembers:
    """The index that stands beside a tar. Raises: OSError, ValueError where it is none."""
    index = json.loads(path.read_text(encoding="utf-8"))
    try:
        extents = np.stack([np.array(index[name], dtype=np.int64) for name in _COLUMNS], axis=1)
        keys = [key.encode("utf-8", "surrogatepass") for key in index["keys"]]
        problems = [TarProblem(*problem) for problem in index["problems"]]
        return _table(keys, index["starts"], index["extension_ids"], index["extensions"], extents, problems)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as err:
        raise ValueError(f"{path} is not an index of a tar ({err!r})") from err


def index_json(members: ShardMembers, **extra: Any) -> bytes:
    """The index as `read_index` takes it, a column each of what there is about members: small, and quickly read."""
    ends = [0, *members.key_ends.tolist()]
    keys = [members.key_bytes[a:b].decode("utf-8", "surrogatepass") for a, b in pairwise(ends)]
    table = {
        **extra,
        "keys": keys,
        "starts": members.starts.tolist(),
        "extensions": members.extensions,
        "extension_ids": members.extension_ids.tolist(),
        **dict(zip(_COLUMNS, members.extents.T.tolist(), strict=True)),
        "problems": [list(vars(problem).values()) for problem in members.problems],
    }
    return json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


_COLUMNS = ("offsets", "sizes", "crc32")
_HEADERS_BYTES = 2**13  # of a tar, read together


def _table(
    keys: list[bytes],
    starts: list[int],
    ids: list[int],
    extensions: list[str],
    extents: np.ndarray,
    problems: list[TarProblem],
) -> ShardMembers:
    """Raises: ValueError where the columns do not belong together."""
    wide = len(extensions) > np.iinfo(np.uint16).max
    table = ShardMembers(
        key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
        key_bytes=b"".join(keys),
        starts=np.array(starts, dtype=np.int32),
        extension_ids=np.array(ids, dtype=np.uint32 if wide else np.uint16),
        extensions=extensions,
        extents=extents,
        problems=problems,
    )
    rising = np.diff(table.starts)
    if (
        len(table.starts) != len(keys) + 1
        or table.starts[0] != 0
        or table.starts[-1] != len(ids)
        or len(table.extents) != len(ids)
        or (rising < 0).any()
        or (len(ids) and int(table.extension_ids.max()) >= len(extensions))
        or not all(isinstance(extension, str) for extension in extensions)
        or (np.diff(table.extents[:, 0]) <= 0).any()
    ):
        raise ValueError(f"{len(keys)} keys, {len(starts)} starts and {len(ids)} members do not fit together")
    return table
