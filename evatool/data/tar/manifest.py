"""A folder of shards as `ShardWriter` leaves it: its manifest, and the samples that the manifest lists.

The manifest is written last, so a folder without it is not a data set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evatool.core.bounded_json import read_json
from evatool.core.errors import DataError
from evatool.data.image.header import MAX_PIXELS
from evatool.data.tar.index import ShardMembers, read_index
from evatool.data.tar.reader import TarReader, scan_whole

MANIFEST = "manifest.json"
FORMAT = "evatool-shards-1"
MAX_MANIFEST_BYTES = 2**30
"""Of the list of some five million shards."""


class ShardIndex(TarReader):
    """The samples of a folder as `ShardWriter` left it, in the order of its manifest.

    Attributes:
        manifest: contents of `manifest.json`.
        decoded_bytes: size of all pictures as uint8 RGB.
        max_pixels: limit on a picture's size, as prepared.
    Raises: DataError naming the folder or shard where something is missing or of another size than written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_shard_manifest(folder)
        self.max_pixels = int(self.manifest.get("max_pixels", MAX_PIXELS))
        self.decoded_bytes = int(self.manifest["decoded_bytes"])
        shards = self.manifest["shards"]
        paths = [folder / shard["file"] for shard in shards]
        for path, shard in zip(paths, shards, strict=True):
            _check_size(path, shard["bytes"])
        scans = [_read_index(folder / shard["index"], path) for path, shard in zip(paths, shards, strict=True)]
        for path, shard, table in zip(paths, shards, scans, strict=True):
            if len(table) != shard["num_samples"]:
                raise DataError(
                    f"{path.name} has {len(table)} samples in its index and {shard['num_samples']} in the manifest",
                    where=str(folder),
                    fix="run `evatool data-prepare` again into a new folder",
                )
        super().__init__(paths, scans)
        if not self.keys:
            raise DataError("the manifest lists no samples", where=str(folder / MANIFEST))


def read_shard_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of shards. Raises: DataError where there is none or it cannot be read."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise DataError(
            f"there is no folder {folder}",
            where="data.train",
            expected="a folder of shards as `evatool data-prepare` writes it, e.g. runs/<name>/train",
            fix="run `evatool data-prepare` first, or correct `data.train`",
        )
    try:
        found: dict[str, Any] = read_json(path, MAX_MANIFEST_BYTES, memory_per_byte=20) if path.is_file() else {}
        if found.get("format") == FORMAT:
            return found
    except (OSError, ValueError, AttributeError) as err:
        raise DataError(f"{path} is not a manifest of shards ({err})", fix="run `evatool data-prepare` again") from err
    inner = folder / "train"
    raise DataError(
        f"{path} has format {found.get('format')!r}" if found else f"{folder} has no {MANIFEST}: it is not finished",
        where=str(folder),
        expected=f"a folder of shards of format {FORMAT!r}, as `evatool data-prepare` writes it: runs/<name>/train",
        fix=f"did you mean {inner}?" if (inner / MANIFEST).is_file() else "run `evatool data-prepare` (again)",
    )


def _check_size(path: Path, expected: int) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size != expected:
        raise DataError(
            f"{path.name} is missing" if size is None else f"{path.name} has {size} bytes instead of {expected}",
            where=str(path.parent),
            expected="the file as the manifest lists it",
            fix="copy it again, or run `evatool data-prepare` again into a new folder",
        )


def _read_index(path: Path, tar: Path) -> ShardMembers:
    try:
        return read_index(path)
    except (OSError, ValueError):
        return scan_whole(tar)  # the index is a convenience: the tar itself says the same
