"""Bootstrap intervals against plain resampling, against theory, and at their edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evatool.eval.intervals import Interval, bootstrap_mean, paired_difference


def plain_bootstrap(values: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """Means of explicitly drawn resamples, the definition."""
    rng = np.random.default_rng(seed)
    return values[rng.integers(0, values.size, (num_resamples, values.size))].mean(axis=1)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(np.r_[np.ones(60), np.zeros(240)], id="right-or-wrong"),
        pytest.param(np.r_[np.ones(30), np.zeros(240), -np.ones(30)], id="paired-difference"),
        pytest.param(np.random.default_rng(0).random(300), id="all-distinct"),
    ],
)
def test_bounds_are_those_of_explicit_resampling(values: np.ndarray) -> None:
    interval = bootstrap_mean(values, num_resamples=20_000, seed=1, support=(-1, 1))
    low, high = np.quantile(plain_bootstrap(values, 20_000, 2), [0.025, 0.975])
    spread = values.std() / values.size**0.5
    assert interval.value == pytest.approx(values.mean())
    assert abs(interval.low - low) < 0.08 * spread
    assert abs(interval.high - high) < 0.08 * spread


def test_resampling_in_blocks_keeps_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(200)
    monkeypatch.setattr("evatool.eval.intervals._CELLS", 200 * 7)
    interval = bootstrap_mean(values, num_resamples=5000, seed=3)
    low, high = np.quantile(plain_bootstrap(values, 5000, 4), [0.025, 0.975])
    assert interval.low == pytest.approx(low, abs=0.004)
    assert interval.high == pytest.approx(high, abs=0.004)


def test_equal_inputs_give_equal_bounds_and_another_seed_does_not() -> None:
    values = np.random.default_rng(0).random(100) < 0.3
    first = bootstrap_mean(values, num_resamples=500, seed=7)
    assert first == bootstrap_mean(values, num_resamples=500, seed=7)
    assert first != bootstrap_mean(values, num_resamples=500, seed=8)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(400):
        interval = bootstrap_mean(rng.random(300) < 0.2, num_resamples=500, seed=trial)
        covered += interval.low <= 0.2 <= interval.high
    assert 0.91 <= covered / 400 <= 0.98


@pytest.mark.parametrize(("hits", "low", "high"), [(0, 0.0, 0.0303), (1, 0.9697, 1.0)], ids=["none", "all"])
def test_answers_that_all_agree_still_have_an_interval(hits: int, low: float, high: float) -> None:
    # exact (Clopper-Pearson) bound of 0 and 120 hits in 120: 1 - 0.025 ** (1 / 120)
    interval = bootstrap_mean(np.full(120, hits), num_resamples=100, seed=0)
    assert interval.value == hits
    assert interval.low == pytest.approx(low, abs=1e-4)
    assert interval.high == pytest.approx(high, abs=1e-4)


def test_a_difference_seen_in_one_sample_is_not_called_clear() -> None:
    interval = paired_difference([0], [1], num_resamples=1000, seed=0)
    assert interval.value == 1
    assert not interval.excludes_zero


def test_equal_answers_differ_by_nothing() -> None:
    predictions = np.arange(50) % 3 == 0
    interval = paired_difference(predictions, predictions, num_resamples=1000, seed=0)
    assert interval.value == 0
    assert interval.low < 0 < interval.high


def test_pairing_tells_apart_what_separate_intervals_cannot() -> None:
    rng = np.random.default_rng(0)
    before = rng.random(400) < 0.3
    after = before.copy()
    after[np.flatnonzero(~before)[:12]] = True  # only gains: 3 points
    paired = paired_difference(before, after, num_resamples=2000, seed=0)
    separate = [bootstrap_mean(x, num_resamples=2000, seed=0) for x in (before, after)]
    assert paired.value == pytest.approx(0.03)
    assert paired.excludes_zero
    assert separate[0].high > separate[1].low


def test_copies_of_a_sample_in_one_cluster_add_no_certainty() -> None:
    rng = np.random.default_rng(0)
    predictions = rng.random(200) < 0.4
    copied, clusters = np.repeat(predictions, 5), np.repeat(np.arange(200), 5)
    once = bootstrap_mean(predictions, num_resamples=20_000, seed=0)
    clustered = bootstrap_mean(copied, num_resamples=20_000, seed=0, clusters=clusters)
    naive = bootstrap_mean(copied, num_resamples=20_000, seed=0)
    width = lambda i: i.high - i.low  # noqa: E731
    assert width(clustered) == pytest.approx(width(once), rel=0.05)
    assert width(naive) == pytest.approx(width(once) / 5**0.5, rel=0.1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(0, 2**31))
def test_bounds_enclose_the_value_within_what_is_possible(hits: list[bool], seed: int) -> None:
    interval = bootstrap_mean(hits, num_resamples=200, seed=seed)
    assert 0 <= interval.low <= interval.high <= 1
    # 200 resamples of a few samples: the mean may fall just outside a percentile bound, never far
    assert interval.low - 0.2 <= interval.value <= interval.high + 0.2


@pytest.mark.parametrize(
    ("low", "high", "clear"), [(0.1, 0.2, True), (-0.2, -0.1, True), (-0.1, 0.1, False), (0.0, 0.1, False)]
)
def test_zero_on_the_edge_is_not_excluded(low: float, high: float, clear: bool) -> None:
    assert Interval((low + high) / 2, low, high).excludes_zero is clear


@pytest.mark.parametrize("values", [[], [[1.0]], [float("nan"), 1.0]], ids=["empty", "two-dimensional", "nan"])
def test_values_that_have_no_mean_are_refused(values: list) -> None:
    with pytest.raises(ValueError, match="bootstrap_mean"):
        bootstrap_mean(values, num_resamples=10, seed=0)


def test_a_paired_difference_needs_the_same_samples() -> None:
    with pytest.raises(ValueError, match="same samples"):
        paired_difference([1, 0], [1, 0, 1], num_resamples=10, seed=0)
