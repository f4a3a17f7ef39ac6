"""WebDataset shards on disk: written so that a half-written set never looks whole, read by sample number.

A folder holds `00000.tar`, `00001.tar`, ..., beside each an index of its members (`00000.index.json`), and
`manifest.json`, which is written last: a folder without it is not a data set. The tars are plain WebDataset; any
other reader of that format takes them without index and manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from evatool.core.errors import DataError
from evatool.data.image.header import EXTENSIONS, MAX_PIXELS
from evatool.data.tar.index import WHOLE_TAR, ShardMembers, index_json, read_index, scan_file

MANIFEST = "manifest.json"
FORMAT = "evatool-shards-1"
PICTURE_MEMBERS = (*EXTENSIONS.values(), "jpeg")


@dataclass(frozen=True)
class Sample:
    """A picture file and what is known of it, as it goes into a shard.

    Args:
        key: sample name in the tar, without a dot; equal stems of two members make a sample.
        extension: of the picture member.
        picture: the encoded file, byte for byte.
        members: further members by extension, e.g. `txt`, `json`, `cls`.
        decoded_bytes: size of the picture as uint8 RGB.
    """

    key: str
    extension: str
    image: bytes
    members: Mapping[str, bytes] = field(default_factory=dict)
    decoded_bytes: int = 0


def json_member(value: Any) -> bytes:
    """`value` as a UTF-8 JSON member."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True).encode()


class ShardWriter:
    """Writes samples into tars of at most `samples_per_shard`.

    Each tar is written under a temporary name, flushed to disk and renamed; `finish` writes the manifest last. Left
    by an exception, the unfinished tar is removed and no manifest appears.

    Args:
        folder: made if absent.
        samples_per_shard: samples a tar.
        name: tar name without suffix by shard number.
    Raises: OSError when the disk is full.
    """

    def __init__(self, folder: Path, *, samples_per_shard: int, name: str = "{:05d}") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.samples_per_shard, self.name = folder, samples_per_shard, name
        self.shards: list[dict[str, Any]] = []
        self.num_samples = 0
        self.decoded_bytes = 0
        self._tar: _OpenTar | None = None

    def write(self, sample: Sample) -> None:
        """Append one sample."""
        if self._tar is None:
            self._tar = _OpenTar(self.folder / (self.name.format(len(self.shards)) + ".tar"))
        self._tar.add(sample)
        self.num_samples += 1
        self.decoded_bytes += sample.decoded_bytes
        if self._tar.num_samples >= self.samples_per_shard:
            self._close_tar()

    def finish(self, **extra: Any) -> dict[str, Any]:
        """Close the last tar and write the manifest, with `extra` in it; returns the manifest."""
        self._close_tar()
        manifest = {
            "format": FORMAT,
            "num_samples": self.num_samples,
            "num_bytes": sum(shard["bytes"] for shard in self.shards),
            "decoded_bytes": self.decoded_bytes,
            **extra,
            "shards": self.shards,
        }
        write_file(self.folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False).encode())
        return manifest

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tar is not None:
            self._tar.abandon()
            self._tar = None

    def _close_tar(self) -> None:
        if self._tar is not None:
            tar, self._tar = self._tar, None
            self.shards.append(tar.close())


class _OpenTar:
    """One tar while it is written."""

    def __init__(self, path: Path) -> None:
        from webdataset import TarWriter

        self.path, self.partial = path, path.with_name(f".{path.name}.partial")
        self.num_samples = 0
        self.last_key = ""
        self.checksums: list[int] = []  # CRC-32 of each member, so that a reader finds damage in a picture
        self.file = _HashingFile(self.partial.open("wb"))
        # A fixed time and owner, so that equal samples give equal bytes and checksums.
        self.tar = TarWriter(self.file, encoder=False, mtime=0, user="evatool", group="evatool")

    def add(self, sample: Sample) -> None:
        assert sample.key != self.last_key, f"two samples in a row have key {sample.key}: readers would merge them"
        assert "." not in sample.key, f"sample key {sample.key} holds a dot: readers would cut it there"
        self.last_key = sample.key
        members = {sample.extension: sample.image, **sample.members}
        self.tar.write({"__key__": sample.key, **members})
        # webdataset writes members in the order of their names.
        self.checksums += [zlib.crc32(members[name]) for name in sorted(members)]
        self.num_samples += 1

    def close(self) -> dict[str, Any]:
        try:
            self.tar.close()
            self.file.sync_and_close()
            members = scan_file(self.partial)
            assert len(members.places) == len(self.checksums), "webdataset wrote other members than it was given"
            members.places[:, 2] = self.checksums
        except BaseException:
            self.abandon()
            raise
        index_path = self.path.with_suffix(".index.json")
        write_file(index_path, index_json(members))
        os.replace(self.partial, self.path)
        sync_folder(self.path.parent)
        return {
            "file": self.path.name,
            "index": index_path.name,
            "num_samples": self.num_samples,
            "bytes": self.file.num_bytes,
            "sha256": self.file.digest.hexdigest(),
        }

    def abandon(self) -> None:
        # Closing flushes what is left, and that fails again on a full disk. The tar goes first: garbage collection
        # would close it later, into a closed file.
        with contextlib.suppress(OSError):
            self.tar.close()
        with contextlib.suppress(OSError):
            self.file.raw.close()
        self.partial.unlink(missing_ok=True)


class _HashingFile:
    """A binary file for writing that counts and checksums what passes."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw, self.digest, self.num_bytes = raw, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.num_bytes += len(data)
        return self.raw.write(data)

    def sync_and_close(self) -> None:
        self.raw.flush()
        os.fsync(self.raw.fileno())
        self.raw.close()


def write_file(path: Path, data: bytes) -> None:
    """Write a whole file: temporary name beside it, flush to disk, rename."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, i.e. renames inside it, to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class TarReader:
    """Random access to the samples of local tars, without unpacking; sample i is the i-th in the order of `paths`.

    For sets whose keys fit in memory. Reading is safe from several processes: each opens the tars itself and reads at
    explicit offsets.

    Args:
        paths: tars.
        scanned: what is known of each tar already, e.g. from its index.
    Raises: DataError naming a tar that cannot be scanned to its end.
    """

    def __init__(self, paths: Sequence[Path], scanned: Iterable[ShardMembers] | None = None) -> None:
        self._paths = list(paths)
        self._tables = list(map(_scan_whole, self._paths) if scanned is None else scanned)
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


class ShardIndex(TarReader):
    """The samples of a folder as `ShardWriter` left it, in the order of its manifest.

    Attributes:
        manifest: as read.
        decoded_bytes: size of all pictures as uint8 RGB.
        max_pixels: limit on a picture's size, as prepared.
    Raises: DataError naming the folder or shard where something is missing or of another size than written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
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


def read_manifest(folder: Path) -> dict[str, Any]:
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
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if found.get("format") == FORMAT:
            return found
    except (ValueError, AttributeError) as err:
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
        return _scan_whole(tar)  # the index is a convenience: the tar itself says the same


def _scan_whole(path: Path) -> ShardMembers:
    """The samples of a tar. Raises: DataError where it is no tar or damaged."""
    try:
        members = scan_file(path)
    except OSError as err:
        raise DataError(f"{path.name} cannot be read: {err}", where=str(path)) from err
    damage = [problem for problem in members.problems if problem.cause in WHOLE_TAR]
    if damage:
        raise DataError(f"{path.name} cannot be read as a tar: {damage[0]}", where=str(path), fix="copy it again")
    return members
