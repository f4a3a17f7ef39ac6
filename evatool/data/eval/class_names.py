"""Which class a folder of images is: told by its name, never by its place among the others.

A list of class names in the order of their numbers says nothing of folders by itself. Folders are matched to it as

    1. lines `folder<TAB>name` of a `classnames.txt`
    2. WordNet ids of ImageNet
    3. the names themselves, whatever their capitals, spaces, underscores, hyphens and signs, and after a leading number
    4. numbers: 0 to N - 1, or 1 to N, with zeros before them or not

and whatever matches in none of these ways is refused: a score under wrong names looks like a score.
"""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from evatool.core.errors import DataError
from evatool.data.eval.tars import read_lines

NAMES = "classnames.txt"
_SHOWN = 4

# Folders of releases whose names in clip-benchmark are other words: torchvision's folders, in the order of its labels.
_RELEASED = {
    "eurosat": "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential River "
    "SeaLake",
    "pcam": "normal tumor",
}

_IMAGENETS = dict.fromkeys(("imagenetv2", "imagenet_sketch", "imagenet-sketch"), "imagenet1k")
"""Sets with ImageNet's thousand classes."""


@dataclass(frozen=True)
class Classes:
    """The classes of a set in the order of their numbers, and the class number of each folder."""

    names: list[str]
    number_of: dict[str, int]


def classes_of(folder: Path, folders: Sequence[str], prompts: str) -> Classes:
    """The classes that the folders of a set are.

    Args:
        folder: of the set, which may hold a `classnames.txt`.
        folders: names of the folders of images.
        prompts: the set's name in clip-benchmark's tables.
    Raises: DataError where a folder is of no class or of several, or nothing says what numbered folders are.
    """
    if (folder / NAMES).is_file():
        lines = read_lines(folder / NAMES)
        if any("\t" in line for line in lines):
            return _by_table(folder / NAMES, lines, folders)
        return _by_list(lines, folders, str(folder / NAMES), folder, prompts)
    if folders and all(name in imagenet_names() for name in folders):
        return _in_order([imagenet_names()[name] for name in folders], folders)
    table = _IMAGENETS.get(prompts, prompts)
    if table in packaged("classnames"):
        names = list(packaged("classnames")[table])
        return _by_list(names, folders, f"clip-benchmark's class names of {table}", folder, prompts)
    if folders and all(name.isdecimal() for name in folders):
        raise DataError(
            f"the folders of {folder.name} are numbers ({', '.join(folders[:_SHOWN])}, ...), and nothing names them",
            where=str(folder),
            expected=f"{NAMES} with a line `folder<TAB>name` for each folder",
            fix=f"write {folder / NAMES}",
        )
    return _in_order([name.replace("_", " ") for name in folders], folders)


def _in_order(names: list[str], folders: Sequence[str]) -> Classes:
    return Classes(names, {name: number for number, name in enumerate(folders)})


def _by_table(path: Path, lines: Sequence[str], folders: Sequence[str]) -> Classes:
    parts = [line.split("\t") for line in lines]
    wrong = [number for number, part in enumerate(parts, 1) if len(part) != 2 or not all(p.strip() for p in part)]
    if wrong:
        raise DataError(
            f"line {wrong[0]} of {path.name} is not a folder, a tab and a name",
            where=str(path),
            expected="folder<TAB>name in every line",
            fix="correct the line, or leave out all folders where the lines are the folders' own names",
        )
    named = {first.strip(): second.strip() for first, second in parts}
    numbers = {name: number for number, name in enumerate(named)}
    missing = [name for name in folders if name not in named]
    if missing or len(named) < len(parts):
        twice = [first for first, _ in parts if [p[0] for p in parts].count(first) > 1]
        what = f"names {twice[0]} twice" if twice else f"has no line for {', '.join(missing[:_SHOWN])}"
        raise DataError(
            f"{path.name} {what}", where=str(path), expected="one line a folder", fix="write folder<TAB>name for it"
        )
    return Classes(list(named.values()), {name: numbers[name] for name in folders})


def _by_list(names: list[str], folders: Sequence[str], source: str, folder: Path, prompts: str) -> Classes:
    """Folders matched to names that stand in the order of their numbers."""
    for match in (_as_wordnet, _as_names, _as_released, _as_numbers):
        found = match(names, folders, prompts)
        if found is not None:
            return Classes(names, found)
    raise _mismatch(names, folders, source, folder)


def _as_wordnet(names: list[str], folders: Sequence[str], _: str) -> dict[str, int] | None:
    """ImageNet's ids, where the names are ImageNet's for them: of all classes, or of those that are there."""
    known = imagenet_names()
    if not all(name in known for name in folders):
        return None
    for ids in (list(known), sorted(folders)):
        if names == [known[each] for each in ids]:
            return {name: ids.index(name) for name in folders}
    return None


def _as_names(names: list[str], folders: Sequence[str], _: str) -> dict[str, int] | None:
    numbers: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        numbers.setdefault(_plain(name), []).append(number)
    for key in (_plain, _after_number):
        found = {name: numbers.get(key(name), []) for name in folders}
        if all(len(each) == 1 for each in found.values()) and len({each[0] for each in found.values()}) == len(found):
            return {name: each[0] for name, each in found.items()}
    return None


def _as_released(names: list[str], folders: Sequence[str], prompts: str) -> dict[str, int] | None:
    order = _RELEASED.get(prompts, "").split()
    if len(order) != len(names) or not set(folders) <= set(order):
        return None
    return {name: order.index(name) for name in folders}


def _as_numbers(names: list[str], folders: Sequence[str], _: str) -> dict[str, int] | None:
    """From 0 or from 1. All must be there: numbers of a part could be those of the part alone."""
    if len(folders) != len(names) or not all(name.isascii() and name.isdecimal() for name in folders):
        return None
    numbers = {name: int(name) for name in folders}
    for first in (0, 1):
        if set(numbers.values()) == set(range(first, first + len(names))):
            return {name: number - first for name, number in numbers.items()}
    return None


def _plain(name: str) -> str:
    """Letters and digits alone, small and without accents."""
    letters = unicodedata.normalize("NFKD", name).casefold()
    return "".join(char for char in letters if char.isalnum())


def _after_number(name: str) -> str:
    return _plain(re.sub(r"^\d+[.\s_-]+", "", name))


def _mismatch(names: list[str], folders: Sequence[str], source: str, folder: Path) -> DataError:
    plain = {_plain(name): name for name in names}
    strange = [name for name in folders if _plain(name) not in plain and _after_number(name) not in plain]
    shown = []
    for name in strange[:_SHOWN]:
        near = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=0.4)
        shown.append(f"{name}" + (f" (near: {plain[near[0]]})" if near else ""))
    what = f"{len(strange)} of {len(folders)} folders are none of the {len(names)} class names"
    if not strange:
        what, shown = "several folders are the same class, or a folder is several", list(folders[:_SHOWN])
    return DataError(
        f"{what}: {', '.join(shown)}",
        where=source,
        expected=f"folders named as the classes, or numbered from 0 to {len(names) - 1} or from 1 to {len(names)}",
        fix=f"write {folder / NAMES} with a line `folder<TAB>name` for each folder",
    )


@cache
def packaged(what: str) -> dict[str, list[str]]:
    """A table that ships with clip-benchmark; its package is not imported, which would cost seconds."""
    text = resources.files("clip_benchmark").joinpath(f"datasets/en_{what}.json").read_text(encoding="utf-8")
    table: dict[str, list[str]] = json.loads(text)
    return table


@cache
def imagenet_names() -> Mapping[str, str]:
    """ImageNet's class names in clip-benchmark by WordNet id, in the order of the class numbers."""
    from clip_benchmark.datasets.builder import all_imagenet_wordnet_ids

    return dict(zip(all_imagenet_wordnet_ids, packaged("classnames")["imagenet1k"], strict=True))
