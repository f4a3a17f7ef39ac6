"""The samples of one tar: which members each has and where they lie, a hundred bytes a sample.

A sample is a run of members with one key, as webdataset has it: the key is the path up to the first dot of its last
component, the rest in lower case is the extension.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evatool.data.tars import CAUSES, Member, TarProblem, scan_tar

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
        problems: what could not be used, as found by a scan.
    """

    key_ends: np.ndarray  # (samples,) int64: ends of the keys in `key_bytes`
    key_bytes: bytes
    starts: np.ndarray  # (samples + 1,) int32: first member of each sample
    extension_ids: np.ndarray  # (members,) uint16
    extensions: list[str]
    places: np.ndarray  # (members, 3) int64: offset, size, crc32
    problems: list[TarProblem]

    def __len__(self) -> int:
        return len(self.key_ends)

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        arrays = (self.key_ends, self.starts, self.extension_ids, self.places)
        return len(self.key_bytes) + sum(array.nbytes for array in arrays)

    def key(self, number: int) -> str:
        """Key of a sample."""
        start = int(self.key_ends[number - 1]) if number else 0
        return self.key_bytes[start : int(self.key_ends[number])].decode("utf-8", "surrogatepass")

    def members(self, number: int) -> list[tuple[str, Place]]:
        """Extensions and places of a sample's members, in the order of the tar; an extension may come twice."""
        first, last = int(self.starts[number]), int(self.starts[number + 1])
        ids, places = self.extension_ids[first:last].tolist(), self.places[first:last].tolist()
        return [(self.extensions[i], Place(*place)) for i, place in zip(ids, places, strict=True)]


def scan_file(path: Path) -> ShardMembers:
    """The samples of a tar by its headers. Raises: OSError."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            scan = scan_tar(b"")
        else:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                scan = scan_tar(mapped)
    return group_members(scan.members, scan.problems)


def group_members(members: Iterable[Member], problems: list[TarProblem]) -> ShardMembers:
    """Members of a tar, in its order, as samples."""
    builder = _Builder()
    starts, ids, places = builder.starts, builder.ids, builder.places
    last, known = None, builder.extensions
    for name, offset, size in members:  # without calls: once a member of a first epoch over plain tars
        dot = name.find(".", name.rfind("/") + 1)
        key, extension = (name[:dot], name[dot + 1 :].lower()) if dot >= 0 else (name, "")
        if key != last:
            builder.keys.append(key.encode("utf-8", "surrogatepass"))
            starts.append(len(ids))
            last = key
        number = known.get(extension)
        if number is None:
            number = known[extension] = len(known)
        ids.append(number)
        places.append((offset, size, -1))
    return builder.finish(problems)


def read_index(path: Path) -> ShardMembers:
    """The index that stands beside a tar. Raises: OSError, ValueError where it is none."""
    index = json.loads(path.read_text(encoding="utf-8"))
    try:
        builder = _Builder()
        for key, members in zip(index["keys"], index["members"], strict=True):
            builder.start(key)
            for extension, place in members.items():
                builder.add(extension, *place)
        return builder.finish([TarProblem(*problem) for problem in index.get("problems", ())])
    except (KeyError, TypeError, AttributeError) as err:
        raise ValueError(f"{path} is not an index of a tar ({err!r})") from err


def index_json(members: ShardMembers, **extra: Any) -> bytes:
    """The index as `read_index` takes it. Of members with the same extension the first is kept: see `ShardReader`."""
    keys, samples, start = [], [], 0
    first, names = 0, [members.extensions[i] for i in members.extension_ids.tolist()]
    places = [place if place[2] >= 0 else place[:2] for place in members.places.tolist()]
    for end, last in zip(members.key_ends.tolist(), members.starts[1:].tolist(), strict=True):
        keys.append(members.key_bytes[start:end].decode("utf-8", "surrogatepass"))
        sample = dict(zip(names[first:last], places[first:last], strict=True))
        if len(sample) < last - first:
            sample = _with_duplicates(names[first:last], places[first:last])
        samples.append(sample)
        start, first = end, last
    table = {
        **extra,
        "keys": keys,
        "members": samples,
        **({"problems": [list(vars(p).values()) for p in members.problems]} if members.problems else {}),
    }
    return json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def _with_duplicates(names: list[str], places: list[list[int]]) -> dict[str, list[int]]:
    """A second member of one name makes the sample bad; two places would not fit one key of JSON."""
    sample: dict[str, list[int]] = {}
    for name, place in zip(names, places, strict=True):
        while name in sample:
            name += DUPLICATE
        sample[name] = place
    return sample


DUPLICATE = "\0twice"
"""Ends the extension, in an index, of a member whose name the sample already had. No name in a tar holds a NUL."""


class _Builder:
    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.starts: list[int] = []
        self.ids: list[int] = []
        self.extensions: dict[str, int] = {}
        self.places: list[tuple[int, int, int]] = []

    def start(self, key: str) -> None:
        self.keys.append(key.encode("utf-8", "surrogatepass"))
        self.starts.append(len(self.ids))

    def add(self, extension: str, offset: int, size: int, crc32: int = -1) -> None:
        self.ids.append(self.extensions.setdefault(extension, len(self.extensions)))
        self.places.append((offset, size, crc32))

    def finish(self, problems: list[TarProblem]) -> ShardMembers:
        wide = len(self.extensions) > np.iinfo(np.uint16).max
        return ShardMembers(
            key_ends=np.cumsum([len(key) for key in self.keys], dtype=np.int64),
            key_bytes=b"".join(self.keys),
            starts=np.array([*self.starts, len(self.ids)], dtype=np.int32),
            extension_ids=np.array(self.ids, dtype=np.uint32 if wide else np.uint16),
            extensions=list(self.extensions),
            places=np.array(self.places, dtype=np.int64).reshape(-1, 3),
            problems=problems,
        )
