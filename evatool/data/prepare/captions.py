"""Caption files: CSV, TSV or JSONL with a picture and a caption a row."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TextIO

from evatool.core.bounded_json import parse_json
from evatool.core.errors import DataError
from evatool.core.regular_files import open_regular
from evatool.recipe.schema import FolderSource

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_SUFFIXES = (".jsonl", ".ndjson")
_BOMS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}  # the longer marks first: UTF-32's begins with UTF-16's


@dataclass(frozen=True)
class CaptionRow:
    """One row: its line in the file, and either picture and caption or what is wrong with it."""

    line: int
    image: str = ""
    caption: str = ""
    cause: str | None = None
    detail: str = ""


def read_captions(section: FolderSource) -> list[CaptionRow]:
    """Every row of the caption file; rows that cannot be used have a `cause`.

    Raises: DataError where the file is missing, empty, of an unknown kind or encoding, or lacks a column.
    """
    path = section.captions
    suffix = path.suffix.lower()
    if suffix not in _DELIMITERS and suffix not in _JSON_SUFFIXES:
        raise DataError(
            f"caption file {path.name} has suffix {suffix or 'none'!r}",
            where="data.captions",
            expected=", ".join((*_DELIMITERS, *_JSON_SUFFIXES)),
            fix="rename or convert the file",
        )
    if not path.is_file():
        raise DataError(
            f"there is no caption file {path}", where="data.captions", fix="correct the path; it is relative to here"
        )
    try:
        # Bytes that do not fit become lone surrogates where the encoding allows it, so that one bad row costs one row.
        encoding = _reading_encoding(section.encoding)
        with io.TextIOWrapper(open_regular(path), encoding, errors="surrogateescape", newline="") as file:
            rows = list(_csv_rows(file, section, _DELIMITERS[suffix]) if suffix in _DELIMITERS else _json_rows(file))
    except (UnicodeError, LookupError) as err:
        raise _encoding_error(section, str(err)) from err
    except csv.Error as err:
        raise DataError(f"{path.name} cannot be read: {err}", where=str(path)) from err
    if not rows:
        raise DataError(f"caption file {path.name} has no rows", where=str(path))
    if suffix in _JSON_SUFFIXES:
        found = {key: None for _, row in rows if isinstance(row, dict) for key in row}
        _check_columns(list(found), section)
    return [_caption_row(line, row, section) for line, row in rows]


def _csv_rows(file: TextIO, section: FolderSource, delimiter: str) -> Iterator[tuple[int, Mapping[Any, Any]]]:
    reader = csv.DictReader(file, delimiter=delimiter)
    header = list(reader.fieldnames or [])
    if not header:
        raise DataError(f"caption file {section.captions.name} is empty", where=str(section.captions))
    if any(map(_has_undecodable, header)):
        raise _encoding_error(section, "the header has bytes that do not belong to it")
    _check_columns(header, section)
    for row in reader:
        yield reader.line_num, row


def _json_rows(file: TextIO) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield number, parse_json(line)
            except ValueError as err:
                yield number, f"not JSON: {err}"


def _caption_row(line: int, row: Any, section: FolderSource) -> CaptionRow:
    if not isinstance(row, dict):
        detail = row if isinstance(row, str) and row.startswith("not JSON") else "not a JSON object"
        return CaptionRow(line, cause="bad-row", detail=detail)
    image, caption = row.get(section.image_column), row.get(section.caption_column)
    if None in row:  # csv's key for cells beyond the header: an unquoted delimiter has cut the caption
        return CaptionRow(line, cause="bad-row", detail="more cells than the header has columns; quote the caption")
    if not isinstance(image, str) or not isinstance(caption, str):
        name = section.caption_column if isinstance(image, str) else section.image_column
        return CaptionRow(line, cause="bad-row", detail=f"no text in column {name!r}")
    if _has_undecodable(image) or _has_undecodable(caption):
        return CaptionRow(line, cause="undecodable-text", detail=f"bytes that are not {section.encoding}")
    if not image.strip():
        return CaptionRow(line, cause="bad-row", detail=f"no text in column {section.image_column!r}")
    if not caption.strip():
        return CaptionRow(line, image, cause="empty-caption")
    return CaptionRow(line, image, " ".join(caption.split()))


def _check_columns(found: list[str], section: FolderSource) -> None:
    wanted = {"image_column": section.image_column, "caption_column": section.caption_column}
    missing = {key: name for key, name in wanted.items() if name not in found}
    if not missing:
        return
    others = [name for name in found if name not in wanted.values()]
    near = {key: get_close_matches(name, others, n=1, cutoff=0.4) for key, name in missing.items()}
    if len(missing) == len(others) == 1:
        near = dict.fromkeys(missing, others)
    hints = [f"--set data.{key}={names[0]}" for key, names in near.items() if names]
    raise DataError(
        f"caption file {section.captions.name} has no column {' and no column '.join(map(repr, missing.values()))}",
        where=str(section.captions),
        expected=f"columns named as data.image_column and data.caption_column say; the file has {', '.join(found)}",
        fix=" ".join(hints) or "set data.image_column and data.caption_column to the file's names",
    )


def _reading_encoding(encoding: str) -> str:
    # A byte order mark before UTF-8, as spreadsheets write it, would become part of the first column's name.
    return "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding


def _has_undecodable(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


def _encoding_error(section: FolderSource, detail: str) -> DataError:
    start = b""
    if section.captions.is_file():
        with open_regular(section.captions) as file:
            start = file.read(4)
    marked = next((name for bom, name in _BOMS.items() if start.startswith(bom)), None)
    return DataError(
        f"caption file {section.captions.name} is not {section.encoding}: {detail}",
        where=str(section.captions),
        expected="the encoding that data.encoding names",
        fix=f"--set data.encoding={marked or 'latin-1, or whatever the file was written in'}",
    )
