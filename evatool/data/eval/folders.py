"""Image folders (a folder a class) and Birdsnap as evaluation sets."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from evatool.core.errors import DataError
from evatool.core.regular_files import open_regular
from evatool.data.eval.class_names import classes_of, packaged
from evatool.data.eval.samples import FileSamples
from evatool.data.eval.tars import read_lines

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
) | {".pnm", ".jp2", ".j2k", ".avif"}
"""Images that are read, whatever case their suffix has."""
UNREAD_SUFFIXES = frozenset(
    (".heic", ".heif", ".jxl", ".svg", ".psd", ".tga", ".ico", ".exr", ".hdr", ".raw", ".dng", ".cr2", ".nef", ".arw")
)
"""Images that are not: a set without them would not be the set."""
BIRDSNAP_TEMPLATE = "a photo of a {c}, a type of bird."  # CLIP's own prompt for Birdsnap
_TEMPLATES = "zeroshot_classification_templates.txt"
Opened = tuple[str, list[str], list[str], FileSamples]


def is_image_folder(folder: Path, split: str) -> bool:
    """True if the folder, or its folder `split`, holds folders with pictures."""
    return any(any(map(_is_image, inner.iterdir())) for inner in _class_folders(_root(folder, split)))


def open_image_folder(folder: Path, split: str, prompts: str) -> Opened:
    """Kind, class names, templates and samples; which class a folder is, `classes_of` tells.

    Class names are those of `classnames.txt`, else clip-benchmark's for `prompts` (ImageNet's by WordNet id where the
    folders are named so), else the folders' names with spaces for underscores.
    Raises: DataError where a folder is of no class, holds images that are not read, or no templates are known.
    """
    root = _root(folder, split)
    folders = _class_folders(root)
    classes = classes_of(folder, [inner.name for inner in folders], prompts)
    paths, labels = [], []
    for inner in folders:
        own = _images_below(inner)
        paths += own
        labels += [classes.number_of[inner.name]] * len(own)
    return "classification", classes.names, _templates(folder, prompts), FileSamples(paths, labels, root)


def is_birdsnap(folder: Path) -> bool:
    """True if the folder holds the lists of the Birdsnap release."""
    return (folder / "species.txt").is_file() and (folder / "test_images.txt").is_file()


def open_birdsnap(folder: Path) -> Opened:
    """The test pictures of Birdsnap 1.1 that are there: its pictures are fetched one by one, and many are gone.

    `species.txt` (id, common, scientific, dir) and `test_images.txt` (path) are tables with a header and tabs between
    columns; pictures lie in `images/<species dir>/`. The suite's expected count guards against other copies.
    Raises: DataError where a table lacks a column, or a path names no species.
    Source: docs/reference/open-clip-and-clip-benchmark.md#birdsnap.
    """
    species = _table(folder / "species.txt", ("id", "common", "dir"))
    species.sort(key=lambda row: int(row["id"]))
    label_of = {row["dir"]: label for label, row in enumerate(species)}
    paths, labels = [], []
    for row in _table(folder / "test_images.txt", ("path",)):
        own = row["path"].partition("/")[0]
        if own not in label_of:
            raise DataError(
                f"test picture {row['path']} belongs to no species",
                where=str(folder / "test_images.txt"),
                expected="a path that begins with a `dir` of species.txt",
                fix="copy species.txt and test_images.txt of the same release",
            )
        path = folder / "images" / row["path"]
        if path.is_file():
            paths.append(path)
            labels.append(label_of[own])
    if not paths:
        raise DataError(
            "none of the test pictures of Birdsnap is there",
            where=str(folder / "images"),
            fix="run its get_birdsnap.py",
        )
    names = [row["common"] for row in species]
    templates = read_lines(folder / _TEMPLATES) if (folder / _TEMPLATES).is_file() else [BIRDSNAP_TEMPLATE]
    return "classification", names, templates, FileSamples(paths, labels, folder / "images")


def _table(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    with io.TextIOWrapper(open_regular(path), encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, dialect="excel-tab")
        missing = [name for name in columns if name not in (reader.fieldnames or [])]
        if missing:
            raise DataError(
                f"{path.name} lacks the column {', '.join(missing)}",
                where=str(path),
                expected=f"a header line with {', '.join(columns)}, and tabs between columns",
                fix="copy the file of Birdsnap's release again",
            )
        return list(reader)


def _root(folder: Path, split: str) -> Path:
    return folder / split if (folder / split).is_dir() else folder


def _class_folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir() and not is_hidden(path))


def is_hidden(path: Path) -> bool:
    """True for what macOS and others leave beside files: no class and no image."""
    return path.name.startswith(".") or path.name == "__MACOSX"


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not is_hidden(path) and path.is_file()


def _images_below(folder: Path) -> list[Path]:
    """Every image of a class. Raises: DataError where there are images of a format that is not read."""
    files = [path for path in folder.rglob("*") if not any(map(is_hidden, (path, *path.relative_to(folder).parents)))]
    unread = sorted(path.name for path in files if path.suffix.lower() in UNREAD_SUFFIXES)
    if unread:
        raise DataError(
            f"{len(unread)} images of {folder.name} are of a format that is not read: {', '.join(unread[:3])}",
            where=str(folder),
            expected=", ".join(sorted(SUFFIXES)),
            fix="convert them, or move them out of the set if they are none of it",
        )
    return sorted(filter(_is_image, files))


def _templates(folder: Path, prompts: str) -> list[str]:
    if (folder / _TEMPLATES).is_file():
        return read_lines(folder / _TEMPLATES)
    known = packaged("zeroshot_classification_templates")
    prompts = "imagenet1k" if prompts.startswith("imagenet") else prompts  # ImageNet's variants have its prompts
    if prompts not in known:
        raise DataError(
            f"image folder {folder.name} has no prompt templates, and clip-benchmark knows none for {prompts!r}",
            where=str(folder),
            expected="one prompt with {c} for the class name a line",
            fix=f"write {folder / _TEMPLATES}",
        )
    return list(known[prompts])
