"""Random access to the samples of local tars, without unpacking them."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from evatool.core.errors import DataError
from evatool.data.tar.index import WHOLE_TAR, ShardMembers, scan_file
from evatool.data.tar.open_files import FILES, new_reader, open_for_reading


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
        self._number = new_reader()

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
        handle = FILES.acquire((self._number, shard), lambda: open_for_reading(self._paths[shard]))
        out = {}
        try:
            for extension in wanted:
                place = members[extension]
                data = os.pread(handle, place.size, place.offset)
                if len(data) != place.size:
                    raise OSError(f"{self.shard_name(i)} ends inside member {self.keys[i]}.{extension}")
                out[extension] = data
        finally:
            FILES.release((self._number, shard))
        return out

    def _locate(self, i: int) -> tuple[int, int]:
        shard = bisect_right(self._first, i) - 1
        return shard, i - self._first[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_number"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _number=new_reader())

    def close(self) -> None:
        """Let go of the tars; a later read opens them again."""
        FILES.close((self._number, shard) for shard in range(len(self._paths)))

    def __del__(self) -> None:
        if hasattr(self, "_number"):
            self.close()


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
