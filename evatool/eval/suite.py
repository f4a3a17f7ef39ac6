"""Suites: which evaluation sets belong together, as data files in `evatool/eval/suites/`. No torch."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from evatool.core.bounded_toml import parse_toml
from evatool.core.errors import DataError, RecipeError
from evatool.core.regular_files import is_regular, read_regular_text
from evatool.eval.tasks.build import SetKind

_MAX_BYTES = 2**20
_MAX_INCLUDED = 16
_MAX_PROBLEMS = 20  # that are told of a file
_FOLDER = Path(__file__).parent / "suites"
_FROZEN = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True, defer_build=True)


class Composition(BaseModel):
    """A set of scenes that is composed from the pictures of another set when it is opened."""

    model_config = _FROZEN

    from_: str
    """Name of the classification set that gives the pictures."""
    side: int
    """Pictures along each side of a scene."""
    seed: int
    """Seed of the order in which images are put together."""


class SuiteSet(BaseModel):
    """One evaluation set of a suite."""

    model_config = _FROZEN

    name: str
    """Name in results, and of the set's folder."""
    title: str
    """Name in reports."""
    phrase: str
    """Name inside a sentence: accuracy "on ..."."""
    about: str
    """One line on what the set measures."""
    kind: SetKind
    """The kind of evaluation task: what is asked of the model."""
    metric: str = "top1"
    """The metric that the benchmark is reported by."""
    variant: str = ""
    """Which version, split or part of the benchmark this is."""
    wds: str = ""
    """Name among clip-benchmark's `wds/` sets: of the folder on disk, and of the copy on the hub."""
    hub: str = ""
    """Data set on the Hugging Face hub; clip-benchmark's copy of `wds` when empty."""
    convert: str = ""
    """Command that makes the set where there is no copy on the hub; `{folder}` is where it belongs."""
    split: str = "test"
    """Folder of the shards within the set's folder."""
    train_split: str = ""
    """Folder of the training shards, for probes; none when empty."""
    train_set: str = ""
    """Set of the suite with the same classes that probes are trained on, where there is no training split."""
    num_samples: int | None = None
    """Pictures of the full set."""
    num_classes: int | None = None
    """Classes of the full set."""
    num_captions: int | None = None
    """Captions of the full set, with repetitions."""
    source: str = ""
    """Who says so: where the counts are from."""
    not_comparable: str = ""
    """Why the published numbers of this benchmark are not of this variant."""
    compose: Composition | None = None
    """How the set is composed from another one."""
    headline: bool = False
    """The set that reports name first."""

    @property
    def hub_repo(self) -> str:
        """Data set on the hub; empty where there is none."""
        return self.hub or (f"clip-benchmark/wds_{self.wds.replace('/', '-')}" if self.wds else "")

    @property
    def folders(self) -> list[str]:
        """Folders below the data folder where the set is looked for, in this order."""
        cleaned = self.wds.replace("/", "-")
        if self.compose is not None:
            return [self.compose.from_]
        names = [self.name, *([self.wds, f"wds_{cleaned}", f"wds_{self.name}_test"] if self.wds else [])]
        return list(dict.fromkeys(names))

    @property
    def prompts(self) -> str:
        """Name in clip-benchmark's tables of class names and templates."""
        return self.wds.rpartition("/")[2] or self.name


class Average(BaseModel):
    """A mean over sets, every set counting the same."""

    model_config = _FROZEN

    name: str
    """Name in results."""
    title: str
    """Name in reports."""
    metric: str
    """Metric that is averaged; `mean_recall` is the mean of all six recalls."""
    sets: list[str] | None = None
    """Sets averaged over; all when absent."""


class Gap(BaseModel):
    """A set's metric less the mean over others."""

    model_config = _FROZEN

    name: str
    """Name in results."""
    title: str
    """Name in reports."""
    about: str
    """One line on what the difference says."""
    metric: str
    """Metric that is compared."""
    base: str
    """Set that the others are taken from."""
    sets: list[str]
    """Sets whose mean is taken away."""


class Include(BaseModel):
    """Sets that another suite describes."""

    model_config = _FROZEN

    suite: str
    """Name of the other suite."""
    sets: list[str]
    """Names of its sets, in the order of this suite."""


class Suite(BaseModel):
    """Evaluation sets that are reported together."""

    model_config = _FROZEN

    name: str
    """Name in recipes and on the command line."""
    title: str
    """Name in reports."""
    about: str
    """One line on what the suite is."""
    prepare: str
    """Command that makes or fetches the sets, or says how."""
    partial: Literal["refused", "named"] = "refused"
    """A set with another count than stated: refused, or evaluated under a name that says so."""
    averages: list[Average] = []
    """Means over sets."""
    gaps: list[Gap] = []
    """Differences between sets."""
    include: Include | None = None
    """Sets taken from another suite; they come first."""
    sets: list[SuiteSet] = []
    """In the order of the report."""

    def set(self, name: str) -> SuiteSet:
        """The set of that name, which must exist."""
        return next(s for s in self.sets if s.name == name)

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
    """The shipped suite of that name, or the suite file at that path.

    Raises: RecipeError if there is none, naming the nearest, or if the file is wrong.
    """
    return _load_suite(name, ())


def _first_lines(text: str) -> str:
    lines = text.splitlines()
    return "\n".join(lines[:40] + ([f"and {len(lines) - 40} lines more"] if len(lines) > 40 else []))


def _load_suite(name: str, chain: tuple[str, ...]) -> Suite:
    """`chain` holds the suites that include this one."""
    known = list_suites()
    path = _FOLDER / f"{name}.toml" if name in known else Path(name)
    if path.suffix != ".toml" or not is_regular(path):
        raise RecipeError(
            "no such suite",
            problems=[f"eval.suite: {_no_such('suite', name, known)}"],
            expected=f"one of {', '.join(known)}, or the path of a suite file",
        )
    if len(chain) >= _MAX_INCLUDED:
        raise RecipeError(
            f"suites include each other in a circle, or more than {_MAX_INCLUDED} deep",
            where=" -> ".join((*chain, name)[-3:]),
            fix="remove one of these `include`",
        )
    try:
        suite = Suite.model_validate(_with_python_names(parse_toml(read_regular_text(path, _MAX_BYTES))))
    except OSError as error:
        raise RecipeError(f"suite file {path.name} cannot be read: {error.strerror}", where=str(path)) from error
    except ValidationError as error:
        raise RecipeError(f"suite file {path.name} is wrong: {_first_lines(str(error))}", where=str(path)) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise RecipeError(f"suite file {path.name} is wrong: {error}", where=str(path)) from error
    if suite.include is not None:
        other = _load_suite(suite.include.suite, (*chain, name))
        others = {s.name: s for s in other.sets}
        gone = [n for n in suite.include.sets if n not in others][:_MAX_PROBLEMS]
        if gone:
            problems = [_no_such("evaluation set", n, list(others)) for n in gone]
            raise RecipeError(f"suite file {path.name} is wrong", where=str(path), problems=problems)
        own = [others[n] for n in suite.include.sets]
        suite = suite.model_copy(update={"sets": [*own, *suite.sets]})
    _check_names(suite, path)
    return suite


def find_set(data: Path, entry: SuiteSet) -> Path:
    """Folder of a set, the first that exists of those where it is looked for; the first of all where none does."""
    root = data / "eval" if (data / "eval").is_dir() else data
    paths = [root / name for name in entry.folders]
    return next((path for path in paths if path.is_dir()), paths[0])


def find_sets(data: Path, suite: Suite, chosen: Sequence[SuiteSet], *, may_be_empty: bool = False) -> dict[str, Path]:
    """Folder of each chosen set, present or not. `data` holds the sets, or is the run folder of data-prepare.

    Raises: DataError if the folder is missing, or holds not one of the sets, unless `may_be_empty`.
    """
    if not data.is_dir() and not may_be_empty:
        raise DataError(
            f"there is no folder {data}",
            where="eval.data",
            expected=f"a folder with the evaluation sets of suite {suite.name!r}",
            fix=f"{suite.prepare}, then give its run folder as eval.data (--data)",
        )
    paths = {s.name: find_set(data, s) for s in chosen}
    if not may_be_empty and not any(path.is_dir() for path in paths.values()):
        root = data / "eval" if (data / "eval").is_dir() else data
        inside = sorted(p.name for p in root.iterdir() if p.is_dir())[:8]
        raise DataError(
            f"{root} holds none of the evaluation sets {', '.join(paths)}",
            where="eval.data",
            expected=f"one folder a set; found {', '.join(inside) if inside else 'no folders'}",
            fix=f"{suite.prepare}, then give its run folder as eval.data (--data)",
        )
    return paths


def fetch_command(entry: SuiteSet, folder: Path) -> str:
    """The command that puts the set into `folder`; empty where there is none."""
    if entry.hub_repo:
        return f"hf download --repo-type dataset {entry.hub_repo} --local-dir {folder}"
    return entry.convert.format(folder=folder)


def check_counts(
    suite: Suite, entry: SuiteSet, counts: dict[str, int | None], folder: Path, *, allow_partial: bool
) -> str:
    """A phrase on what differs from the benchmark, such as "18 of 729 pictures"; empty where nothing does.

    Args:
        counts: `pictures`, `classes` and `captions` as found; None where they do not apply.
    Raises: DataError where the suite refuses parts and `allow_partial` is not set.
    """
    stated = {"pictures": entry.num_samples, "classes": entry.num_classes, "captions": entry.num_captions}
    wrong = [f"{counts[what]} of {n} {what}" for what, n in stated.items() if n and counts.get(what) not in (None, n)]
    if wrong and suite.partial == "refused" and not allow_partial:
        raise DataError(
            f"this is not {entry.title}: {', '.join(wrong)}",
            where=str(folder),
            expected=", ".join(f"{n:,} {what}" for what, n in stated.items() if n)
            + (f" ({entry.variant})" if entry.variant else ""),
            fix=(fetch_command(entry, folder) or suite.prepare) + "; or evaluate it as a part with eval.allow_partial",
        )
    return ", ".join(wrong)


def _with_python_names(table: dict[str, Any]) -> dict[str, Any]:
    """`from` is a word of Python's own."""
    for entry in table.get("sets", []):
        if isinstance(entry.get("compose"), dict) and "from" in entry["compose"]:
            entry["compose"]["from_"] = entry["compose"].pop("from")
    return table


def _check_names(suite: Suite, path: Path) -> None:
    """Every set that is named anywhere exists."""
    known = [s.name for s in suite.sets]
    named = [n for a in suite.averages for n in a.sets or []]
    named += [n for g in suite.gaps for n in (g.base, *g.sets)] + [s.train_set for s in suite.sets if s.train_set]
    counts = Counter(known)
    gone = [name for name in dict.fromkeys(named) if name not in counts]
    problems = [_no_such("evaluation set", name, known) for name in gone[:_MAX_PROBLEMS]]
    problems += [f"set {name!r} is there twice" for name, count in counts.items() if count > 1][:_MAX_PROBLEMS]
    if problems:
        raise RecipeError(f"suite file {path.name} is wrong", where=str(path), problems=problems)


def _no_such(what: str, name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name[:200], known[:1000], n=1, cutoff=0.5)
    return f"no {what} {name[:200]!r}" + (f"; did you mean {near[0]!r}?" if near else "")
