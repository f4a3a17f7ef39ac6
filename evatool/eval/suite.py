"""Suites: which evaluation sets belong together, as data files in `evatool/eval/suites/`. No torch."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from evatool.errors import DataError, RecipeError

_FOLDER = Path(__file__).parent / "suites"


class SuiteSet(BaseModel):
    """One evaluation set of a suite."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """Name in results, and of the set's folder."""
    title: str
    """Name in reports."""
    phrase: str
    """Name inside a sentence: accuracy "on ..."."""
    about: str
    """What the set measures, in a line."""
    kind: Literal["classification", "retrieval"]
    """What is asked of the model."""
    split: str = "test"
    """Folder of the shards within the set's folder."""
    num_samples: int | None = None
    """Pictures of the full set. A folder with another count is reported as a subset, not under the set's name."""
    num_classes: int | None = None
    """Classes of the full set."""
    headline: bool = False
    """The set that reports name first."""


class Suite(BaseModel):
    """Evaluation sets that are reported together."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """Name in recipes and on the command line."""
    title: str
    """Name in reports."""
    about: str
    """What the suite is, in a line."""
    prepare: str
    """Command that makes or fetches the sets."""
    sets: list[SuiteSet]
    """In the order of the report."""

    def chosen(self, names: Sequence[str] | None) -> list[SuiteSet]:
        """The named sets in the suite's order; all when `names` is None.

        Raises: RecipeError naming every unknown set and the nearest known one.
        """
        if names is None:
            return list(self.sets)
        known = [s.name for s in self.sets]
        problems = [_no_such("evaluation set", name, known) for name in names if name not in known]
        if problems or not names:
            raise RecipeError(
                f"eval.sets does not fit suite {self.name!r}",
                problems=problems or ["eval.sets is empty: name at least one set, or leave it out for all"],
                expected=f"some of {', '.join(known)}",
            )
        return [s for s in self.sets if s.name in names]


def list_suites() -> list[str]:
    """Names of the suites that ship with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load_suite(name: str) -> Suite:
    """The suite of that name.

    Raises: RecipeError if there is none, naming the nearest.
    """
    known = list_suites()
    if name not in known:
        raise RecipeError(
            "no such suite",
            problems=[f"eval.suite: {_no_such('suite', name, known)}"],
            expected=f"one of {', '.join(known)}",
        )
    path = _FOLDER / f"{name}.toml"
    try:
        return Suite.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise RecipeError(f"suite file {path.name} is wrong: {error}", where=str(path)) from error


def find_sets(folder: Path, suite: Suite, chosen: Sequence[SuiteSet]) -> dict[str, Path]:
    """Folder of each chosen set, present or not. `folder` holds the sets, or is the run folder of data-prepare.

    Raises: DataError if the folder is missing, or holds not one of the sets.
    """
    if not folder.is_dir():
        raise DataError(
            f"there is no folder {folder}",
            where="eval.data",
            expected=f"a folder with the evaluation sets of suite {suite.name!r}",
            fix=f"{suite.prepare}, then give its run folder as eval.data (--data)",
        )
    root = folder / "eval" if (folder / "eval").is_dir() else folder
    paths = {s.name: root / s.name for s in chosen}
    if not any(path.is_dir() for path in paths.values()):
        inside = sorted(p.name for p in root.iterdir() if p.is_dir())[:8]
        raise DataError(
            f"{root} holds none of the evaluation sets {', '.join(paths)}",
            where="eval.data",
            expected=f"one folder a set; found {', '.join(inside) if inside else 'no folders'}",
            fix=f"{suite.prepare}, then give its run folder as eval.data (--data)",
        )
    return paths


def _no_such(what: str, name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"no {what} {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
