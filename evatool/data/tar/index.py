"""The samples of one tar: which members each has and where they lie, a hundred bytes a sample.

A sample is a run of members with one key, as webdataset has it: the key is the path up to the first dot of its last
component, the rest in lower case is the extension. A name without a dot there, or with nothing before it (`README`,
macOS's `._a.jpg`), belongs to no sample, and neither does what stands in a folder such as `__meta__`. One difference:
webdataset reads `d/._a.jpg` as a sample called `d/`; here it is passed over like `._a.jpg`.
Source: https://github.com/webdataset/webdataset/blob/main/src/webdataset/tariterators.py, `base_plus_ext`.

An index is JSON, of which the first bytes say what it belongs to:

    {"version":2,"tar_bytes":N,"tar_mtime_ns":N,"num_samples":N,"body_crc32":N,"head_crc32":N,  rest of the object

`head_crc32` covers the bytes before it and `body_crc32` the rest: a damaged index is never believed. Version 1, which
`data-prepare` wrote before, has neither checksums nor a version; such an index is believed until it is in doubt.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import zlib
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evatool.core.bounded_json import parse_json
from evatool.core.regular_files import open_regular, read_regular
from evatool.data.tar.open_files import open_for_reading
from evatool.data.tar.scan import CAUSES, TarProblem, TarScan, scan_tar

WHOLE_TAR = frozenset(list(CAUSES)[: list(CAUSES).index("link")]) - {"no-end-mark"}
"""Problems that can cost samples after them; the others cost one member, or nothing."""

VERSION = 2
"""Version of an index. It is raised with every change of what makes a sample, so that tars are scanned anew."""


class Place(NamedTuple):
    """Where a member lies in its tar; `crc32` of its bytes, -1 where it is not known."""

    offset: int
    size: int
    crc32: int = -1


@dataclass
class ShardMembers:
    """The samples of a tar in its order.

    Attributes:
        problems: headers and members that could not be used: first those that concern the grouping into samples, then
            the others in the order of the tar.
        is_verified: False where this comes from an index without checksums.
    """

    key_ends: np.ndarray  # (samples,) int64: ends of the keys in `key_bytes`
    key_bytes: bytes
    starts: np.ndarray  # (samples + 1,) int32: first member of each sample
    extension_ids: np.ndarray  # (members,) uint16
    extensions: list[str]
    extents: np.ndarray  # (members, 3) int64: offset, size, crc32
    problems: list[TarProblem]
    is_verified: bool = True

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

    @cached_property
    def split_samples(self) -> frozenset[int]:
        """Numbers of the samples that are parts of one: their keys are equal, and they have no extension in common.

        A key that comes again with the same extensions is another sample of the same name, as in two tars joined.
        """
        numbers: dict[str, list[int]] = defaultdict(list)
        for number in range(len(self)):
            numbers[self.key(number)].append(number)
        found: list[int] = []
        for same in numbers.values():
            if len(same) > 1:
                ids = [i for number in same for i in self.rows(number)[0]]
                if len(set(ids)) == len(ids):
                    found += same
        return frozenset(found)


def scan_file(path: Path) -> ShardMembers:
    """The samples of a tar by its headers. Raises: OSError, also where the path is no regular file."""
    handle = open_for_reading(path)
    try:
        if os.fstat(handle).st_size == 0:
            return group_members(scan_tar(b""))
        with mmap.mmap(handle, 0, access=mmap.ACCESS_READ) as mapped:
            # Reading costs less than the page faults of the mapping, whose pages few headers share.
            return group_members(scan_tar(mapped, lambda start: os.pread(handle, _HEADERS_BYTES, start)))
    finally:
        os.close(handle)


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a member by its name; None where it belongs to no sample."""
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    if dot <= base or _META.match(name):
        return None
    return name[:dot], name[dot + 1 :].lower()


def group_members(scan: TarScan) -> ShardMembers:
    """Members of a tar, in its order, as samples."""
    keys: list[bytes] = []
    starts: list[int] = []
    ids: list[int] = []
    known: dict[str, int] = {}
    passed_over: list[int] = []
    last = None
    for i, name in enumerate(scan.names):  # `split_name` without its calls: once a member of a new plain tar
        base = name.rfind("/") + 1
        dot = name.find(".", base)
        if dot <= base or (name[0] == "_" and _META.match(name)):  # no dot, or nothing before it
            passed_over.append(i)
            continue
        key, extension = name[:dot], name[dot + 1 :].lower()
        if key != last:
            keys.append(key.encode("utf-8", "surrogatepass"))
            starts.append(len(ids))
            last = key
        number = known.get(extension)
        if number is None:
            number = known[extension] = len(known)
        ids.append(number)
    extents = np.full((len(scan.names), 3), -1, dtype=np.int64)
    extents[:, 0], extents[:, 1] = scan.offsets, scan.sizes
    problems = list(scan.problems)
    if passed_over:
        first = passed_over[0]
        problems.insert(0, TarProblem("no-key", scan.names[first], scan.offsets[first], len(passed_over)))
        extents = np.delete(extents, passed_over, axis=0)
    table = _table(keys, [*starts, len(ids)], ids, list(known), extents, problems)
    if len(set(keys)) < len(keys) and table.split_samples:
        number = min(table.split_samples)
        offset = int(table.extents[table.starts[number], 0])
        table.problems.insert(0, TarProblem("split-sample", table.key(number), offset, len(table.split_samples)))
    return table


class IndexHead(NamedTuple):
    """What the first bytes of an index say: the tar that it belongs to, and how many samples that has."""

    tar_bytes: int
    tar_mtime_ns: int
    num_samples: int


def read_index_head(path: Path) -> IndexHead | None:
    """The head of an index, by its first bytes; None where it is damaged or of another version. Raises: OSError."""
    with open_regular(path) as file:
        head = _HEAD.match(file.read(_MAX_HEAD_BYTES))
    if head is None or zlib.crc32(head[1]) != int(head["head_crc32"]):
        return None
    return IndexHead(int(head["tar_bytes"]), int(head["tar_mtime_ns"]), int(head["num_samples"]))


def read_index(path: Path) -> ShardMembers:
    """The index of a tar. Raises: OSError, ValueError where it is none, damaged or of another version."""
    data = read_regular(path, _MAX_INDEX_BYTES)
    head = _HEAD.match(data)
    if head is not None:
        if zlib.crc32(head[1]) != int(head["head_crc32"]) or zlib.crc32(data[head.end() :]) != int(head["body_crc32"]):
            raise ValueError(f"{path} is damaged: its checksum does not fit")
    elif data.startswith(b'{"version":'):
        raise ValueError(f"{path} is of another version than {VERSION}, or damaged")
    try:
        index = parse_json(data.decode("utf-8", "surrogatepass"), memory_per_byte=_INDEX_MEMORY)
        extents = np.stack([np.array(index[name], dtype=np.int64) for name in _COLUMNS], axis=1)
        keys = [key.encode("utf-8", "surrogatepass") for key in index["keys"]]
        problems = [TarProblem(*problem) for problem in index["problems"]]
        table = _table(keys, index["starts"], index["extension_ids"], index["extensions"], extents, problems)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as err:
        raise ValueError(f"{path} is not an index of a tar ({err!r:.200})") from err
    table.is_verified = head is not None
    return table


def index_json(members: ShardMembers, *, tar_bytes: int = 0, tar_mtime_ns: int = 0) -> bytes:
    """The index as `read_index` takes it, a column each of what there is about members: small, and quickly read.

    Args:
        tar_bytes, tar_mtime_ns: size and time of the tar, by which a kept index is known to belong to it; 0 where
            something else says so.
    """
    ends = [0, *members.key_ends.tolist()]
    keys = [members.key_bytes[a:b].decode("utf-8", "surrogatepass") for a, b in pairwise(ends)]
    table = {
        "keys": keys,
        "starts": members.starts.tolist(),
        "extensions": members.extensions,
        "extension_ids": members.extension_ids.tolist(),
        **dict(zip(_COLUMNS, members.extents.T.tolist(), strict=True)),
        "problems": [list(vars(problem).values()) for problem in members.problems],
    }
    body = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")[1:]
    head = {"version": VERSION, **IndexHead(tar_bytes, tar_mtime_ns, len(members))._asdict()}
    start = json.dumps({**head, "body_crc32": zlib.crc32(body)}, separators=(",", ":")).encode()[:-1]
    return b'%s,"head_crc32":%d,%s' % (start, zlib.crc32(start), body)


_COLUMNS = ("offsets", "sizes", "crc32")
_META = re.compile(r"__[^/]*__($|/)")
_NUMBERS = ("tar_bytes", "tar_mtime_ns", "num_samples", "body_crc32")
_CRC_COVERS = rf'(\{{"version":{VERSION}' + "".join(rf',"{name}":(?P<{name}>\d{{1,20}})' for name in _NUMBERS) + ")"
_HEAD = re.compile((_CRC_COVERS + r',"head_crc32":(?P<head_crc32>\d{1,20}),').encode())
_MAX_HEAD_BYTES = 256
_MAX_INDEX_BYTES = 2**31  # some 20 million members
_INDEX_MEMORY = 40  # bytes for each of an index, which is numbers and commas for the most part
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
        table.starts.shape != (len(keys) + 1,)
        or table.starts[0] != 0
        or table.starts[-1] != len(ids)
        or table.extents.shape != (len(ids), len(_COLUMNS))
        or table.extension_ids.shape != (len(ids),)
        or (rising < 0).any()
        or (len(ids) and int(table.extension_ids.max()) >= len(extensions))
        or not all(isinstance(extension, str) for extension in extensions)
        or (np.diff(table.extents[:, 0]) <= 0).any()
        or (table.extents[:, :2] < 0).any()
        or not all(_is_problem(problem) for problem in problems)
    ):
        raise ValueError(f"{len(keys)} keys, {len(starts)} starts and {len(ids)} members do not fit together")
    return table


def _is_problem(found: TarProblem) -> bool:
    """True where all fields have their types; an index may hold anything."""
    return (
        found.cause in CAUSES and isinstance(found.name, str) and type(found.offset) is int and type(found.count) is int
    )
