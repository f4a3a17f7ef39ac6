"""WebDataset shards on disk, written so that a half-written set never looks whole.

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
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from evatool.core.atomic_io import sync_folder, write_bytes_atomically
from evatool.data.tar.index import index_json, scan_file
from evatool.data.tar.manifest import FORMAT, MANIFEST


@dataclass(frozen=True)
class Sample:
    """A picture file and what is known of it, as it goes into a shard.

    Args:
        key: sample name in the tar, without a dot; equal stems of two members make a sample.
        extension: extension of the image's member.
        image: the encoded file, byte for byte.
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
        write_bytes_atomically(self.folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False).encode())
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
            assert len(members.extents) == len(self.checksums), "webdataset wrote other members than it was given"
            members.extents[:, 2] = self.checksums
        except BaseException:
            self.abandon()
            raise
        index_path = self.path.with_suffix(".index.json")
        write_bytes_atomically(index_path, index_json(members, tar_bytes=self.file.num_bytes))
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
