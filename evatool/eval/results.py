"""The results of an evaluation as records, and `results.json` that holds them. No torch here."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from evatool.core.atomic_io import write_bytes_atomically
from evatool.core.bounded_json import read_json
from evatool.core.errors import DataError
from evatool.core.shown_text import json_text
from evatool.eval.intervals import LEVEL, Interval
from evatool.eval.task_wording import TaskWording

AVERAGE = "average"
"""Kind of a set record, and metric of its rows, that stand for a figure over several sets."""
SCHEMA = 2
_READABLE = (1, 2)  # what 2 adds has defaults


@dataclass(frozen=True)
class ModelRecord:
    """One evaluated model."""

    name: str
    source: str  # as it was asked for
    fingerprint: str  # of the weights
    image_size: int
    num_parameters: int
    preset: str = ""
    weights: str = ""  # file or folder they were read from
    precision: str = "fp32"  # arithmetic and storage of the weights
    recipe: str = ""  # digest of the training recipe without seed and places; equal for repetitions
    train_seed: int | None = None


@dataclass(frozen=True)
class SetRecord:
    """One evaluated set."""

    name: str
    title: str
    phrase: str  # the title inside a sentence
    about: str
    kind: str  # of its evaluation task, or "average" for figures over several sets
    variant: str  # suite and set; says so when it is only a part of the full set
    n: int  # pictures
    num_classes: int | None = None
    largest_class_share: float | None = None  # accuracy of always naming the commonest class
    headline: bool = False
    metric: str = ""  # the one that the benchmark is reported by
    partial: str = ""  # what differs from the full set
    samples: str = ""  # SHA-256 of keys, picture sizes and labels
    not_comparable: str = ""  # why published numbers of the benchmark are not of this variant

    @property
    def is_average(self) -> bool:
        """True for a figure over several sets."""
        return self.kind == AVERAGE


@dataclass(frozen=True)
class ResultRow:
    """One metric of one model on one set, or over several. `n` counts the values averaged: images, or queries."""

    model: str
    fingerprint: str
    set: str
    variant: str
    kind: str
    metric: str
    value: float
    low: float
    high: float
    chance: float
    n: int
    num_classes: int | None
    seed: int
    seconds: float  # of the model on the set, all its metrics together
    precision: str = "fp32"
    resize: str = "shortest"
    decode: str = "exact"
    prompts: str = ""  # SHA-256 of all prompts
    published: float | None = None  # the published value for this model, where there is one
    published_source: str = ""

    @property
    def interval(self) -> Interval:
        """The value with its bounds."""
        return Interval(self.value, self.low, self.high)


@dataclass(frozen=True)
class DifferenceRow:
    """`after` less `before`, paired over the samples of one set."""

    before: str
    after: str
    set: str
    metric: str
    value: float
    low: float
    high: float
    n: int

    @property
    def interval(self) -> Interval:
        """The difference with its bounds."""
        return Interval(self.value, self.low, self.high)


@dataclass(frozen=True)
class SeedRow:
    """A metric over several training seeds of one recipe."""

    models: list[str]
    set: str
    metric: str
    value: float  # mean over the seeds
    low: float
    high: float
    num_seeds: int

    @property
    def interval(self) -> Interval:
        """The mean with its bounds."""
        return Interval(self.value, self.low, self.high)


@dataclass(frozen=True)
class EvalFailure:
    """A set that could not be evaluated; `set` is None where the model could not be loaded."""

    model: str
    set: str | None
    message: str


@dataclass
class EvalResults:
    """One evaluation: several models on the sets of a suite."""

    suite: str
    title: str
    data: str
    seed: int
    num_bootstrap: int
    models: list[ModelRecord] = field(default_factory=list)  # in the order asked for
    sets: list[SetRecord] = field(default_factory=list)  # in the suite's order
    results: list[ResultRow] = field(default_factory=list)
    differences: list[DifferenceRow] = field(default_factory=list)
    over_seeds: list[SeedRow] = field(default_factory=list)
    failures: list[EvalFailure] = field(default_factory=list)
    near_ties: dict[str, dict[str, list[str]]] = field(default_factory=dict)  # model -> set -> sample keys
    versions: dict[str, str] = field(default_factory=dict)
    machine: str = ""
    seconds: float = 0.0
    level: float = LEVEL
    schema: int = SCHEMA
    own_wording: dict[str, TaskWording] = field(default_factory=dict)  # by kind, of tasks from outside; not written

    def row(self, model: str, set_name: str, metric: str) -> ResultRow | None:
        """The row of that model, set and metric, if it was measured."""
        return next((r for r in self.results if (r.model, r.set, r.metric) == (model, set_name, metric)), None)

    def difference(self, before: str, after: str, set_name: str, metric: str) -> DifferenceRow | None:
        """The paired difference of two models, if it was measured."""
        wanted = (before, after, set_name, metric)
        return next((d for d in self.differences if (d.before, d.after, d.set, d.metric) == wanted), None)

    def metrics_of(self, set_name: str) -> list[str]:
        """Metrics measured on the set, in the order they were."""
        return list(dict.fromkeys(r.metric for r in self.results if r.set == set_name))

    def headline_set(self) -> SetRecord | None:
        """The set that reports name first: the one marked so, else the first."""
        return next((s for s in self.sets if s.headline), self.sets[0] if self.sets else None)


def compared_pairs(models: Sequence[str]) -> list[tuple[str, str]]:
    """Which models are compared: each with the one before it, and the last with the first."""
    pairs = list(itertools.pairwise(models))
    return [*pairs, (models[0], models[-1])] if len(models) > 2 else pairs


def file_name(name: str) -> str:
    """A model's or set's name as a folder or file name."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", name).strip(".") or "_"


def write_results(path: Path, results: EvalResults) -> None:
    """`results.json` (docs/eval.md describes each key); complete or not there."""
    table = asdict(results)
    del table["own_wording"]
    write_bytes_atomically(path, (json_text(table, indent=1, allow_nan=True) + "\n").encode(), make_parents=True)


def read_results(path: Path) -> EvalResults:
    """Read back what `write_results` wrote.

    Raises: DataError if the file is missing, not JSON, or of another schema.
    """
    try:
        table = read_json(path, 256 * 2**20, memory_per_byte=20)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read evaluation results: {error}", where=str(path), fix="run evatool eval") from error
    if not isinstance(table, dict) or table.get("schema") not in _READABLE:
        raise DataError(
            "evaluation results have another layout",
            where=str(path),
            expected=f'"schema": {" or ".join(map(str, _READABLE))}',
            fix="run evatool eval again",
        )
    lists: dict[str, type] = {
        "models": ModelRecord,
        "sets": SetRecord,
        "results": ResultRow,
        "differences": DifferenceRow,
        "over_seeds": SeedRow,
        "failures": EvalFailure,
    }
    try:
        parsed = {key: [_record(kind, row) for row in table.get(key, [])] for key, kind in lists.items()}
        results: EvalResults = _record(EvalResults, {**table, **parsed})
        return results
    except TypeError as error:
        raise DataError(
            f"evaluation results are incomplete: {error}", where=str(path), fix="run evatool eval"
        ) from error


def _record(kind: type, row: dict[str, Any]) -> Any:
    known = {f.name for f in fields(kind)}
    return kind(**{key: value for key, value in row.items() if key in known})
