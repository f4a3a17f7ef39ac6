"""Image folders (a folder a class) and Birdsnap as evaluation sets."""

from __future__ import annotations

import csv
import io
import json
from functools import cache
from importlib import resources
from pathlib import Path

from evatool.core.errors import DataError
from evatool.core.regular_files import open_regular
from evatool.data.eval.samples import FileSamples
from evatool.data.eval.tars import read_lines

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp"))
BIRDSNAP_TEMPLATE = "a photo of a {c}, a type of bird."  # CLIP's own prompt for Birdsnap
_NAMES, _TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
Opened = tuple[str, list[str], list[str], FileSamples]


def is_image_folder(folder: Path, split: str) -> bool:
    """True if the folder, or its folder `split`, holds folders with pictures."""
    return any(any(map(_is_image, inner.iterdir())) for inner in _class_folders(_root(folder, split)))


def open_image_folder(folder: Path, split: str, prompts: str) -> Opened:
    """Kind, class names, templates and samples; classes are the folders in the order of their names.

    Class names are those of `classnames.txt`, else clip-benchmark's for `prompts` (ImageNet's by WordNet id where the
    folders are named so), else the folders' names with spaces for underscores.
    Raises: DataError where the number of names differs from that of the folders, or no templates are known.
    """
    root = _root(folder, split)
    folders = _class_folders(root)
    classnames = _classnames(folder, prompts, [inner.name for inner in folders])
    paths, labels = [], []
    for label, inner in enumerate(folders):
        own = sorted(path for path in inner.rglob("*") if _is_image(path))
        paths += own
        labels += [label] * len(own)
    return "classification", classnames, _templates(folder, prompts), FileSamples(paths, labels, root)


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
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _classnames(folder: Path, prompts: str, folders: list[str]) -> list[str]:
    if (folder / _NAMES).is_file():
        names, source = read_lines(folder / _NAMES), str(folder / _NAMES)
    elif all(name in _imagenet_names() for name in folders):
        return [_imagenet_names()[name] for name in folders]
    elif prompts in _packaged("classnames"):
        names, source = list(_packaged("classnames")[prompts]), f"clip-benchmark's class names of {prompts}"
    else:
        return [name.replace("_", " ") for name in folders]
    if len(names) != len(folders):
        raise DataError(
            f"{len(folders)} folders of classes, but {len(names)} class names",
            where=source,
            expected="one name a folder, in the order of the folders' names",
            fix=f"write {folder / _NAMES} with {len(folders)} lines",
        )
    return names


def _templates(folder: Path, prompts: str) -> list[str]:
    if (folder / _TEMPLATES).is_file():
        return read_lines(folder / _TEMPLATES)
    packaged = _packaged("zeroshot_classification_templates")
    if prompts not in packaged:
        raise DataError(
            f"image folder {folder.name} has no prompt templates, and clip-benchmark knows none for {prompts!r}",
            where=str(folder),
            expected="one prompt with {c} for the class name a line",
            fix=f"write {folder / _TEMPLATES}",
        )
    return list(packaged[prompts])


@cache
def _packaged(what: str) -> dict[str, list[str]]:
    """A table that ships with clip-benchmark; its package is not imported, which would cost seconds."""
    text = resources.files("clip_benchmark").joinpath(f"datasets/en_{what}.json").read_text(encoding="utf-8")
    table: dict[str, list[str]] = json.loads(text)
    return table


@cache
def _imagenet_names() -> dict[str, str]:
    """ImageNet's class names in clip-benchmark by WordNet id."""
    from clip_benchmark.datasets.builder import all_imagenet_wordnet_ids

    return dict(zip(all_imagenet_wordnet_ids, _packaged("classnames")["imagenet1k"], strict=True))
