"""Weights that change over the run."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evatool.recipe.schema.distill import is_used, weight_at

POINTS = st.lists(
    st.tuples(st.integers(0, 10**9), st.floats(0, 1e4)), min_size=2, max_size=6, unique_by=lambda point: point[0]
).map(lambda points: tuple(sorted(points)))


@given(POINTS, st.integers(0, 2 * 10**9))
def test_a_weight_lies_between_its_neighbours(points, samples_seen: int) -> None:
    found = weight_at(points, samples_seen)
    assert all(weight_at(points, start) == pytest.approx(weight) for start, weight in points)
    if samples_seen <= points[0][0]:
        assert found == points[0][1]
    elif samples_seen >= points[-1][0]:
        assert found == points[-1][1]
    else:
        (start, first), (end, last) = next(pair for pair in pairwise(points) if samples_seen <= pair[1][0])
        share = (samples_seen - start) / (end - start)
        assert found == pytest.approx((1 - share) * first + share * last, abs=1e-6)


@given(st.floats(0, 1e4), st.integers(0, 10**9))
def test_a_number_stays(weight: float, samples_seen: int) -> None:
    assert weight_at(weight, samples_seen) == weight
    assert is_used(weight) == (weight > 0)


def test_a_weight_is_used_if_it_is_at_any_time() -> None:
    assert is_used(((0, 0.0), (10, 1.0)))
    assert not is_used(((0, 0.0), (10, 0.0)))
