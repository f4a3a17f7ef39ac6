"""A user's folder of pictures with a caption file: which picture goes with which captions, and what is left out."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from evatool.core.errors import DataError
from evatool.core.regular_files import MAX_IMAGE_FILE_BYTES, read_regular
from evatool.data.image.decode import decode_rgb
from evatool.data.image.header import BadImage, read_header
from evatool.data.prepare.captions import CaptionRow, read_captions
from evatool.data.prepare.skipped import SkippedFiles
from evatool.data.tar.writer import Sample, json_member
from evatool.recipe.schema import FolderSource, ShardSection

_PICTURE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic")
)
"""Files that count as pictures when no row of the caption file names them."""


@dataclass
class CaptionedFile:
    """A picture file and its captions, in the order of the caption file."""

    number: int
    file: str  # relative to the folder, with forward slashes
    captions: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Sample name. A number: file names may hold dots, or anything else."""
        return f"{self.number:08d}"


class ImageFolder:
    """The pictures of a folder matched with the rows of a caption file.

    Rows that name the same picture give it several captions. Everything that does not match is in `bad`.

    Attributes:
        pictures: to be read.
        bad: rows and pictures that cannot be used; reading pictures adds to it.
    Raises: DataError where the folder is missing or has no pictures; BadDataLimitError beyond the limit.
    """

    def __init__(self, section: FolderSource, shards: ShardSection) -> None:
        self.section, self.max_pixels = section, shards.max_pixels
        files = _list_files(section.images)
        rows = read_captions(section)
        self._by_bytes = {os.fsencode(file): file for file in files}
        named = {self._file_of(row, files) for row in rows}
        unnamed = [f for f in files if Path(f).suffix.lower() in _PICTURE_SUFFIXES and f not in named]
        self.num_rows = len(rows)
        self.bad = SkippedFiles(len(rows) + len(unnamed), shards.max_bad_fraction, str(section.images))
        by_file: dict[str, CaptionedFile] = {}
        for row in rows:
            self._match(row, files, by_file)
        for file in unnamed:
            self.bad.add("no-caption", shown_name(file))
        self.bad.check()
        self.images = list(by_file.values())

    def read(self, image: CaptionedFile) -> tuple[Sample, np.ndarray] | None:
        """The picture as a sample, its file byte for byte, with its pixels; None if it is bad, which is then counted.

        Raises: BadDataLimitError beyond the limit.
        """
        try:
            data = read_regular(self.section.images / image.file, MAX_IMAGE_FILE_BYTES)
            header = read_header(data, self.max_pixels)
            pixels = decode_rgb(data, self.max_pixels)
        except OSError as err:
            self.bad.add("unreadable", shown_name(image.file), err.strerror or str(err))
            return None
        except BadImage as err:
            self.bad.add(err.cause, shown_name(image.file), err.detail)
            return None
        members = {
            "txt": image.captions[0].encode(),
            "json": json_member({"file": shown_name(image.file), "captions": image.captions}),
        }
        return Sample(image.key, header.extension, data, members, header.decoded_bytes), pixels

    def _match(self, row: CaptionRow, files: dict[str, None], by_file: dict[str, CaptionedFile]) -> None:
        name = f"{self.section.captions.name} line {row.line}"
        if row.cause is not None:
            self.bad.add(row.cause, name, row.detail)
            return
        file = self._file_of(row, files)
        if file is None:
            self.bad.add("outside-folder", name, row.image)
        elif file not in files:
            self.bad.add("missing-picture", name, row.image)
        else:
            image = by_file.setdefault(file, CaptionedFile(len(by_file), file))
            if row.caption not in image.captions:
                image.captions.append(row.caption)

    def _file_of(self, row: CaptionRow, files: dict[str, None]) -> str | None:
        """The file that a row names, as `_list_files` spells it; None if it leads out of the folder.

        A name on the disk is bytes. Where it is not the row's text in UTF-8, it may be that text in the encoding of the
        caption file: a list and files that were both made with Latin-1 belong together.
        """
        file = _inside(row.image)
        if file is None or file in files:
            return file
        try:
            return self._by_bytes.get(file.encode(self.section.encoding), file)
        except UnicodeEncodeError:
            return file


def shown_name(file: str) -> str:
    """A file's name as text that can be written anywhere; bytes that are not UTF-8 as `\\xe9`."""
    return os.fsencode(file).decode("utf-8", "backslashreplace")


def _inside(image: str) -> str | None:
    """The path as `_list_files` spells it; None if it leads out of the folder."""
    path = posixpath.normpath(image.strip())
    if posixpath.isabs(path) or path.split("/")[0] == "..":
        return None
    return path


def _list_files(folder: Path) -> dict[str, None]:
    """Regular files below `folder`, sorted, relative and with forward slashes."""
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {problem}", where="data.images", fix="correct the path; it is relative to here")
    files = dict.fromkeys(sorted(_walk(folder)))
    if not any(Path(file).suffix.lower() in _PICTURE_SUFFIXES for file in files):
        raise DataError(
            f"{folder} has no pictures in it",
            where="data.images",
            expected=f"files with suffixes such as {', '.join(sorted(_PICTURE_SUFFIXES)[:5])}",
            fix="point data.images at the folder that holds the pictures",
        )
    return files


def _walk(folder: Path) -> Iterator[str]:
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            if os.path.isfile(path):  # no pipes, sockets or broken links: reading those can hang
                yield os.path.relpath(path, folder).replace(os.sep, "/")
