"""Random access to the samples of local tars, without unpacking them."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from evatool.core.errors import DataError
from evatool.data.tar.index import WHOLE_TAR, ShardMembers, scan_file


class TarReader:
    """Random access to the samples of local tars, without unpacking; sample i is the i-th in the order of `paths`.

    For sets whose keys fit in memory. Reading is safe from several processes: each opens the tars itself and reads at
    explicit offsets.

    Args:
        paths: tars.
        scanned: the samples of each tar where they are known already, e.g. from its index.
    Raises: DataError naming a tar that cannot be scanned to its end.
    """

    def __init__(self, paths: Sequence[Path], scanned: Iterable[ShardMembers] | None = None) -> None:
        self._paths = list(paths)
        self._tables = list(map(scan_whole, self._paths) if scanned is None else scanned)
        self._first = [0]
        self.keys: list[str] = []
        for table in self._tables:
            self.keys += map(table.key, range(len(table)))
            self._first.append(len(self.keys))
        self._files: dict[tuple[int, int], int] = {}  # (process, shard) -> file descriptor

    def __len__(self) -> int:
        return len(self.keys)

    def shard_name(self, i: int) -> str:
        """File name of the tar that holds sample i."""
        return self._paths[self._locate(i)[0]].name

    def extensions(self, i: int) -> list[str]:
        """Members of sample i."""
        shard, number = self._locate(i)
        return [extension for extension, _ in self._tables[shard].members(number)]

    def size(self, i: int, extension: str) -> int:
        """Bytes of a member of sample i."""
        shard, number = self._locate(i)
        return dict(self._tables[shard].members(number))[extension].size

    def read(self, i: int, extensions: Iterable[str] | None = None) -> dict[str, bytes]:
        """Members of sample i by extension; only those in `extensions` where given and present.

        Raises: OSError when the tar cannot be read or ends early.
        """
        shard, number = self._locate(i)
        members = dict(self._tables[shard].members(number))
        wanted = members if extensions is None else [e for e in extensions if e in members]
        handle = self._handle(shard)
        out = {}
        for extension in wanted:
            place = members[extension]
            data = os.pread(handle, place.size, place.offset)
            if len(data) != place.size:
                raise OSError(f"{self.shard_name(i)} ends inside member {self.keys[i]}.{extension}")
            out[extension] = data
        return out

    def _locate(self, i: int) -> tuple[int, int]:
        shard = bisect_right(self._first, i) - 1
        return shard, i - self._first[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def close(self) -> None:
        """Let go of the tars; a later read opens them again."""
        own = [key for key in getattr(self, "_files", {}) if key[0] == os.getpid()]
        for key in own:
            os.close(self._files.pop(key))

    def __del__(self) -> None:
        self.close()

    def _handle(self, shard: int) -> int:
        key = (os.getpid(), shard)
        if key not in self._files:
            self._files[key] = os.open(self._paths[shard], os.O_RDONLY)
        return self._files[key]


def scan_whole(path: Path) -> ShardMembers:
    """The samples of a tar. Raises: DataError where it is no tar or damaged."""
    try:
        members = scan_file(path)
    except OSError as err:
        raise DataError(f"{path.name} cannot be read: {err}", where=str(path)) from err
    damage = [problem for problem in members.problems if problem.cause in WHOLE_TAR]
    if damage:
        raise DataError(f"{path.name} cannot be read as a tar: {damage[0]}", where=str(path), fix="copy it again")
    return members
