"""The encoded pictures of an evaluation set, wherever they lie, and what is known of each."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from evatool.core.errors import DataError
from evatool.core.regular_files import MAX_IMAGE_FILE_BYTES, read_regular
from evatool.data.image.header import IMAGE_MEMBERS
from evatool.data.tar.reader import TarReader

MASK_MEMBER = "mask.png"


class Samples(Protocol):
    """Random access to the pictures of a set by number."""

    keys: list[str]
    """Name of each picture, for messages."""

    def __len__(self) -> int: ...
    def image(self, i: int) -> bytes:
        """The encoded picture. Raises: DataError if it cannot be read."""
        ...

    def label(self, i: int) -> int:
        """Class number. Raises: DataError if it is no number."""
        ...

    def captions(self, i: int) -> list[str]:
        """One or more captions; empty where there is none."""
        ...

    def mask(self, i: int) -> np.ndarray:
        """(H, W) int32: 0 background, k + 1 class k. Raises: DataError if there is none."""
        ...

    def where(self, i: int) -> str:
        """File that holds the picture."""
        ...

    def close(self) -> None:
        """Let go of open files; reading opens them again."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of keys, picture sizes and labels."""
        ...

    @property
    def stamp(self) -> str:
        """Changes with the fingerprint and whenever a file of the set is written: names features kept of it."""
        ...


class TarSamples:
    """Samples of tars in clip-benchmark's layout."""

    def __init__(self, tars: list[Path], kind: str) -> None:
        self._reader, self._tars, self._kind = TarReader(tars), tars, kind
        self.keys = self._reader.keys
        self._labels: dict[int, bytes] = {}  # as read for the fingerprint

    def __len__(self) -> int:
        return len(self._reader)

    def extensions(self, i: int) -> list[str]:
        """Members of sample i."""
        return self._reader.extensions(i)

    def image(self, i: int) -> bytes:
        return self._member(i, self._image_members[i])

    def label(self, i: int) -> int:
        text = self._labels[i] if i in self._labels else self._member(i, "cls")
        try:
            return int(text)
        except ValueError as err:
            raise DataError(
                f"the class of {self.keys[i]} is {text[:20]!r}", where=self.where(i), expected="a class number"
            ) from err

    def captions(self, i: int) -> list[str]:
        try:
            text = self._member(i, "txt").decode("utf-8")
        except UnicodeDecodeError as err:
            raise DataError(
                f"the captions of {self.keys[i]} are not UTF-8: {err}", where=self.where(i), fix="convert the set again"
            ) from err
        return [line for line in text.splitlines() if line.strip()]

    def mask(self, i: int) -> np.ndarray:
        return decode_mask(self._member(i, MASK_MEMBER), self.keys[i], self.where(i))

    def where(self, i: int) -> str:
        return str(next(path for path in self._tars if path.name == self._reader.shard_name(i)))

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(self._kind.encode())
        for i, key in enumerate(self.keys):
            members = self._reader.read(i, ("cls", "txt"))
            size = self._reader.size(i, self._image_members[i])
            if "cls" in members:
                self._labels[i] = members["cls"]
            digest.update(f"{key} {size} ".encode() + b" ".join(members.values()) + b"\n")
        return digest.hexdigest()

    @property
    def stamp(self) -> str:
        return stamp_of(self.fingerprint, self._tars)

    def close(self) -> None:
        self._reader.close()

    @cached_property
    def _image_members(self) -> list[str]:
        """Extension of each sample's picture."""
        every = (self._reader.extensions(i) for i in range(len(self)))
        return [next(extension for extension in IMAGE_MEMBERS if extension in own) for own in every]

    def _member(self, i: int, extension: str) -> bytes:
        try:
            return self._reader.read(i, (extension,))[extension]
        except OSError as err:
            raise DataError(f"sample {self.keys[i]} cannot be read: {err}", where=self.where(i)) from err


@dataclass
class FileSamples:
    """Picture files with a class each."""

    paths: list[Path]
    labels: list[int]
    root: Path
    keys: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.keys = [path.relative_to(self.root).as_posix() for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, i: int) -> bytes:
        try:
            return read_regular(self.paths[i], MAX_IMAGE_FILE_BYTES)
        except OSError as err:
            raise DataError(f"picture {self.keys[i]} cannot be read: {err.strerror}", where=str(self.paths[i])) from err

    def label(self, i: int) -> int:
        return self.labels[i]

    def captions(self, i: int) -> list[str]:
        return []

    def mask(self, i: int) -> np.ndarray:
        raise DataError(f"picture {self.keys[i]} has no mask", where=self.where(i))

    def where(self, i: int) -> str:
        return str(self.paths[i])

    def close(self) -> None:
        """No file stays open."""

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for key, path, label in zip(self.keys, self.paths, self.labels, strict=True):
            digest.update(f"{key} {path.stat().st_size} {label}\n".encode())
        return digest.hexdigest()

    @property
    def stamp(self) -> str:
        return stamp_of(self.fingerprint, self.paths)


def stamp_of(fingerprint: str, paths: list[Path]) -> str:
    """A fingerprint together with the sizes and times of files."""
    digest = hashlib.sha256(fingerprint.encode())
    for path in paths:
        status = path.stat()
        digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def decode_mask(data: bytes, key: str, where: str) -> np.ndarray:
    """A mask picture as (H, W) int32. Raises: DataError unless it is a grey (8 or 16 bits) or palette PNG."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode not in ("L", "P", "I;16", "I"):
                raise DataError(
                    f"the mask of {key} has mode {image.mode}", where=where, expected="8-bit grey or palette"
                )
            return np.array(image).astype(np.int32)
    except (OSError, SyntaxError, ValueError) as err:
        raise DataError(f"the mask of {key} cannot be read: {err}", where=where, fix="make the set again") from err
