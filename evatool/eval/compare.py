"""Stored results of several runs set against each other, without running a model. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evatool.core.errors import DataError, RecipeError
from evatool.eval.model_differences import add_averages, add_differences, add_seed_rows
from evatool.eval.prediction_store import KeptPredictions, prediction_path, read_predictions
from evatool.eval.predictions import Predictions
from evatool.eval.results import EvalFailure, EvalResults, ModelRecord, ResultRow, read_results
from evatool.eval.suite import Suite, load_suite
from evatool.eval.tasks.base import EvalTask

RESULTS = "results.json"


def compare_runs(
    runs: Sequence[Path],
    *,
    num_bootstrap: int | None = None,
    seed: int | None = None,
    tasks: Sequence[EvalTask[Any]] = (),
) -> EvalResults:
    """The results of run folders of `evatool eval` as one, each model compared with the first.

    A set whose samples differ between the first model that has it and a later one is left out for the later one, and
    named among the failures.

    Args:
        num_bootstrap, seed: of the differences; the first run's when absent.
        tasks: from outside the package, for sets of their kinds.
    Raises: DataError where a run has no results or no kept predictions, or where nothing can be compared.
    """
    loaded = [(run, _results(run)) for run in runs]
    first = loaded[0][1]
    merged = EvalResults(
        suite=first.suite,
        title=first.title,
        data=", ".join(dict.fromkeys(str(run) for run in runs)),
        seed=first.seed if seed is None else seed,
        num_bootstrap=num_bootstrap or first.num_bootstrap,
        versions=first.versions,
        machine=first.machine,
        own_wording={task.kind: task.wording for task in tasks},
    )
    predictions: dict[tuple[str, str], Predictions] = {}
    for run, results in loaded:
        for model in results.models:
            _take(merged, predictions, run, results, model, tasks)
    if len(merged.models) < 2:
        raise DataError(
            f"{len(merged.models)} model in {', '.join(map(str, runs))}: nothing to compare it with",
            expected="two models or more, in one run folder of evatool eval or in several",
            fix="name another run folder, or evaluate several models in one run",
        )
    suite = _suite(merged, [results for _, results in loaded])
    if suite is not None:
        add_averages(merged, predictions, suite)
    names = [m.name for m in merged.models]
    add_differences(merged, predictions, suite, [(names[0], name) for name in names[1:]])
    add_seed_rows(merged, predictions)
    if not merged.differences:
        raise DataError(
            f"no set was answered by {names[0]} and another model on the same samples",
            expected="runs on the same suite and data",
            fix="evaluate the models on one data folder",
        )
    merged.seconds = sum(results.seconds for _, results in loaded)
    return merged


def _results(run: Path) -> EvalResults:
    path = run if run.is_file() else run / RESULTS
    if not path.is_file():
        raise DataError(
            f"{run} holds no {RESULTS}",
            expected="run folders of evatool eval",
            fix="run evatool eval first, or correct the folder",
        )
    return read_results(path)


def _take(
    merged: EvalResults,
    predictions: dict[tuple[str, str], Predictions],
    run: Path,
    results: EvalResults,
    model: ModelRecord,
    tasks: Sequence[EvalTask[Any]],
) -> None:
    """One model of one run: its rows and kept predictions, under a name of its own."""
    taken = {m.name for m in merged.models}
    folder = run.parent if run.is_file() else run
    name = model.name if model.name not in taken else f"{folder.name}/{model.name}"
    while name in taken:
        name += "'"
    merged.models.append(replace(model, name=name))
    for record in (s for s in results.sets if not s.is_average):
        if results.row(model.name, record.name, results.metrics_of(record.name)[0]) is None:
            continue
        kept = read_predictions(prediction_path(folder, model.name, record.name), tasks)
        known = next((s for s in merged.sets if s.name == record.name), None)
        if known is not None and known.samples != record.samples:
            what = f"{record.title} has other samples in {folder} than in the runs before: not compared"
            merged.failures.append(EvalFailure(name, record.name, what))
            continue
        if known is None:
            merged.sets.append(record)
        predictions[name, record.name] = kept.predictions
        merged.results += _rows(results, model, name, record.name, kept)


def _rows(results: EvalResults, model: ModelRecord, name: str, set_name: str, kept: KeptPredictions) -> list[ResultRow]:
    if kept.model.fingerprint != model.fingerprint:
        raise DataError(
            f"the kept predictions of {model.name} on {set_name} are of other weights than its results",
            fix="run evatool eval again",
        )
    return [replace(row, model=name) for row in results.results if (row.model, row.set) == (model.name, set_name)]


def _suite(merged: EvalResults, every: Sequence[EvalResults]) -> Suite | None:
    """The suite that all runs evaluated, for its averages; None where they differ, or it is gone."""
    if len({results.suite for results in every}) > 1:
        return None
    try:
        return load_suite(merged.suite)
    except RecipeError:  # a suite file of its own, not there any more
        return None
