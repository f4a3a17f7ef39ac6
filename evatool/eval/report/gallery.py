"""Retrieval examples as pictures and captions that a report shows, kept in one file without other assets."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evatool.core.atomic_io import write_bytes_atomically
from evatool.core.bounded_json import read_json
from evatool.core.errors import DataError
from evatool.core.regular_files import MAX_IMAGE_FILE_BYTES, read_regular
from evatool.core.renamed_keys import GALLERY_KEYS, rename
from evatool.core.shown_text import json_text

if TYPE_CHECKING:
    from evatool.eval.tasks.retrieval_examples import RetrievalExample

ImageSource = bytes | Path | str
"""An encoded picture, a file of one, or a ready `data:` URI."""

_MAX_SIDE = 160  # pixels; a gallery tile is at most 96 CSS pixels wide
_MAGIC = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp", b"GIF8": "image/gif"}


@dataclass(frozen=True)
class Item:
    """A picture, a caption, or both."""

    image: str | None = None  # data: URI
    caption: str | None = None


@dataclass(frozen=True)
class Found:
    """A candidate that was found."""

    item: Item
    is_right: bool
    score: float  # cosine


@dataclass(frozen=True)
class ShownRetrieval:
    """One query with what was found, best first."""

    direction: str  # "text_to_image" or "image_to_text"
    query: Item
    found: list[Found]
    rank: int  # place of the best right candidate, from 1
    num_candidates: int
    right: Item | None  # the best right candidate where it is not among those found


@dataclass(frozen=True)
class Gallery:
    """The clearest hits and misses of one model."""

    model: str
    set: str
    best: list[ShownRetrieval]
    worst: list[ShownRetrieval]


@dataclass(frozen=True)
class MissedImage:
    """A picture that was named wrong."""

    image: str  # data: URI
    key: str
    right: str
    named: str


def missed_image(pixels: NDArray[np.uint8], key: str, right: str, named: str) -> MissedImage:
    """(H, W, 3) uint8 with its class and the one it was taken for."""
    return MissedImage(data_uri(encode_image_file(pixels, _MAX_SIDE)), key, right, named)


def data_uri(image: ImageSource) -> str:
    """A picture as a `data:` URI.

    Raises: DataError if the file cannot be read, or the bytes are no PNG, JPEG, WebP or GIF.
    """
    if isinstance(image, str) and image.startswith("data:"):
        return image
    where = str(image) if isinstance(image, str | Path) else "picture in memory"
    try:
        content = image if isinstance(image, bytes) else read_regular(image, MAX_IMAGE_FILE_BYTES)
    except OSError as error:
        raise DataError(f"cannot read a picture of the report: {error}", where=where) from error
    kind = next((mime for magic, mime in _MAGIC.items() if content.startswith(magic)), None)
    if kind is None:
        raise DataError("a picture of the report is in no known format", where=where, expected="PNG, JPEG, WebP or GIF")
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def encode_image_file(pixels: NDArray[np.uint8], max_side: int | None = None) -> bytes:
    """(H, W, 3) uint8 RGB as PNG bytes, shrunk to `max_side` pixels where larger."""
    image = Image.fromarray(pixels)
    if max_side and max(image.size) > max_side:
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def needed_images(examples: Sequence[RetrievalExample]) -> set[int]:
    """Indices of the pictures that a gallery of these examples shows."""
    needed: set[int] = set()
    for example in examples:
        if example.direction == "text_to_image":
            needed.update(example.found, [example.right])
        else:
            needed.add(example.query)
    return needed


def build_gallery(
    model: str,
    set_name: str,
    best: Sequence[RetrievalExample],
    worst: Sequence[RetrievalExample],
    *,
    images: Mapping[int, NDArray[np.uint8]],
    captions: Sequence[str],
    num_images: int,
) -> Gallery:
    """Examples with their pictures, (H, W, 3) uint8 by index, and captions in place of indices."""
    encoded: dict[int, str] = {}

    def item(index: int, is_image: bool) -> Item:
        if not is_image:
            return Item(caption=captions[index])
        if index not in encoded:
            encoded[index] = data_uri(encode_image_file(images[index], _MAX_SIDE))
        return Item(image=encoded[index])

    def shown(example: RetrievalExample) -> ShownRetrieval:
        finds_images = example.direction == "text_to_image"
        missing = not any(example.is_right)
        return ShownRetrieval(
            direction=example.direction,
            query=item(example.query, not finds_images),
            found=[
                Found(item(c, finds_images), right, round(score, 4))
                for c, right, score in zip(example.found, example.is_right, example.scores, strict=True)
            ],
            rank=example.rank + 1,
            num_candidates=num_images if finds_images else len(captions),
            right=item(example.right, finds_images) if missing else None,
        )

    return Gallery(model, set_name, [shown(e) for e in best], [shown(e) for e in worst])


def write_gallery(path: Path, gallery: Gallery) -> None:
    """The gallery with its pictures as one JSON file; complete or not there."""
    write_bytes_atomically(path, (json_text(asdict(gallery), allow_nan=True) + "\n").encode(), make_parents=True)


def read_gallery(path: Path) -> Gallery:
    """Read back what `write_gallery` wrote, also by older versions.

    Raises: DataError if the file is missing or has another layout.
    """
    try:
        table = read_json(path, 256 * 2**20, memory_per_byte=20)
        best, worst = ([_retrieval(row) for row in table[key]] for key in ("best", "worst"))
        return Gallery(table["model"], table["set"], best, worst)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"cannot read retrieval examples: {error}", where=str(path), fix="run evatool eval") from error


def _retrieval(row: dict[str, Any]) -> ShownRetrieval:
    return ShownRetrieval(
        direction=row["direction"],
        query=_item(row["query"]),
        found=[Found(_item(f["item"]), f["is_right"], f["score"]) for f in row["found"]],
        rank=row["rank"],
        num_candidates=row["num_candidates"],
        right=_item(row["right"]) if row["right"] else None,
    )


def _item(row: dict[str, Any]) -> Item:
    """An item as it is stored, by today's names of its keys or by those of older evaluations."""
    return Item(**rename(row, GALLERY_KEYS, "retrieval examples"))
