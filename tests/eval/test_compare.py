"""Stored results against each other: paired, over seeds, averages; and what cannot be compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from eval_runs import SETS, N, a_run

from evatool.core.errors import DataError
from evatool.eval.compare import compare_runs
from evatool.eval.intervals import over_seeds


def test_runs_are_paired_with_the_first(tmp_path: Path) -> None:
    merged = compare_runs([a_run(tmp_path / "a", 0.5), a_run(tmp_path / "b", 0.53), a_run(tmp_path / "c", 0.5)])
    assert [m.name for m in merged.models] == ["model 0", "b/model 0", "c/model 0"]
    change = merged.difference("model 0", "b/model 0", "imagenet1k", "top1")
    assert change is not None
    assert change.value == pytest.approx(0.03, abs=0.01)
    assert change.interval.excludes_zero
    assert change.high - change.low < 0.02  # unpaired it would be six times as wide
    same = merged.difference("model 0", "c/model 0", "imagenet1k", "top1")
    assert same is not None
    assert (same.value, same.interval.excludes_zero) == (0, False)


def test_averages_and_gaps_have_intervals_and_differences(tmp_path: Path) -> None:
    merged = compare_runs([a_run(tmp_path / "a", 0.5), a_run(tmp_path / "b", 0.6)])
    average = merged.row("b/model 0", "robust-average", "average")
    assert average is not None
    of_sets = [merged.row("b/model 0", name, "top1") for name in SETS]
    assert average.value == pytest.approx(np.mean([row.value for row in of_sets if row]))
    single = of_sets[0]
    assert single is not None
    spread = 2 * 1.96 * np.sqrt(single.value * (1 - single.value) / N / len(SETS))
    assert average.high - average.low == pytest.approx(spread, rel=0.2)
    gap = merged.row("b/model 0", "robustness-gap", "average")
    assert gap is not None
    assert gap.value == pytest.approx(0, abs=1e-9)
    change = merged.difference("model 0", "b/model 0", "robust-average", "average")
    assert change is not None
    assert change.value == pytest.approx(0.1, abs=0.01)


def test_partial_sets_count_in_no_average(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / name, 0.5, partial="5 of 50000 pictures") for name in "ab"]
    assert not [r for r in compare_runs(runs).results if r.kind == "average"]


def test_models_of_one_recipe_get_an_interval_over_seeds(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / str(s), 0.5 + 0.01 * s, seed=s) for s in range(3)]
    merged = compare_runs(runs)
    row = next(r for r in merged.over_seeds if (r.set, r.metric) == ("imagenet1k", "top1"))
    values = [r.value for r in merged.results if (r.set, r.metric) == ("imagenet1k", "top1")]
    assert (row.num_seeds, row.value) == (3, pytest.approx(np.mean(values)))
    of_seeds = 4.3027 * np.std(values, ddof=1) / np.sqrt(3)  # t of 2 degrees of freedom
    of_samples = 1.96 * np.sqrt(0.25 / N)
    assert row.high - row.value == pytest.approx(np.hypot(of_seeds, of_samples), rel=0.05)


def test_one_seed_has_no_interval_over_seeds() -> None:
    with pytest.raises(ValueError, match="at least two"):
        over_seeds([0.5], 0.1)


def test_other_samples_are_left_out_and_named(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / "a", 0.5), a_run(tmp_path / "b", 0.6), a_run(tmp_path / "c", 0.6, samples="other")]
    merged = compare_runs(runs)
    assert {f.model for f in merged.failures} == {"c/model 0"}
    assert "other samples" in merged.failures[0].message
    with pytest.raises(DataError, match="on the same samples"):
        compare_runs([runs[0], runs[2]])


def test_one_run_with_several_models_compares_them(tmp_path: Path) -> None:
    merged = compare_runs([a_run(tmp_path / "a", 0.5, models=2)])
    assert next((d.before, d.after) for d in merged.differences) == ("model 0", "model 1")


@pytest.mark.parametrize("case", ["nothing", "one-model", "no-answers"])
def test_what_cannot_be_compared_says_what_to_do(tmp_path: Path, case: str) -> None:
    (tmp_path / "empty").mkdir()
    run = a_run(tmp_path / "a", 0.5)
    if case == "no-answers":
        for path in (run / "predictions").rglob("*.npz"):
            path.unlink()
    with pytest.raises(DataError) as caught:
        compare_runs([tmp_path / "empty"] if case == "nothing" else [run])
    assert caught.value.fix
