"""Where chart marks stand: inside their axis, in order, and at the right value."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import made_up_results

from evatool.eval.report.charts import Names, bar_panels, curve_panel, difference_panels, share_axis


@given(st.floats(0, 1))
def test_an_axis_holds_its_largest_value_and_has_few_round_marks(largest: float) -> None:
    end, ticks = share_axis(largest)
    assert end >= min(largest, 1.0)
    assert 2 <= len(ticks) <= 7
    assert ticks[0].text.rstrip("0.") == ""
    assert all(0 <= tick.at <= 100.0001 for tick in ticks)
    for tick in ticks:  # the number written is the place
        assert float(tick.text) == pytest.approx(tick.at * end, rel=1e-6, abs=1e-9)


def test_bars_stand_where_their_values_are() -> None:
    results = made_up_results({"first": (0.05, 0.03, 0.07), "second": (0.08, 0.06, 0.1)})
    (panel,) = bar_panels(results, Names.of(results))
    first, second = panel.bars
    assert second.length / first.length == pytest.approx(0.08 / 0.05)
    assert first.low < first.length < first.high <= second.high <= 100
    assert panel.chance / first.length == pytest.approx((1 / 729) / 0.05)
    assert first.colour != second.colour


def test_a_value_at_chance_is_marked() -> None:
    results = made_up_results({"at chance": (0.002, 0.0, 0.005), "beyond": (0.05, 0.03, 0.07)})
    assert [bar.at_chance for bar in bar_panels(results, Names.of(results))[0].bars] == [True, False]


@given(st.floats(-0.9, 0.9), st.floats(0.001, 0.3))
def test_a_difference_stands_on_its_side_of_zero(value: float, spread: float) -> None:
    results = made_up_results(differences=[(value, value - spread, value + spread)])
    (panel,) = difference_panels(results, Names.of(results), [("first", "second")])
    (whisker,) = panel.whiskers
    assert 0 <= whisker.low < whisker.at < whisker.high <= 100
    assert (whisker.low > 50) == (value - spread > 0)
    assert (whisker.high < 50) == (value + spread < 0)
    assert any(tick.text == "0" or float(tick.text or 1) == 0 for tick in panel.ticks if tick.at == 50)


def test_more_models_than_colours_share_them() -> None:
    values = {f"model {i}": (0.05, 0.03, 0.07) for i in range(9)}
    names = Names.of(made_up_results(values), {"model 0": "The first"})
    assert set(names.colours.values()) == set(range(6))
    assert names.titles["model 0"] == "The first"


def points_of(path: str) -> list[tuple[float, float]]:
    return [tuple(map(float, point.split(","))) for point in path[1:].split("L")]  # type: ignore[misc]


def test_a_curve_is_drawn_over_its_samples() -> None:
    panel = curve_panel("Loss", [0, 500, 1000], [5.0, 3.0, 2.0], reference=math.log(256), reference_text="a guess")
    assert panel is not None
    raw = points_of(panel.raw)
    assert [x for x, _ in raw] == [0, 50, 100]
    assert raw[0][1] < raw[1][1] < raw[2][1]  # y grows downwards, the loss falls
    assert 0 < raw[0][1] < (panel.reference or 0) + 100
    assert [tick.text for tick in panel.x_ticks] == ["0", "500", "1k"]
    assert (panel.first, panel.last) == ("5", "2")


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    losses = [1 + 1 / (1 + i) for i in range(5000)]
    panel = curve_panel("Loss", [float(i) for i in range(5000)], losses)
    assert panel is not None
    raw = points_of(panel.raw)
    assert len(raw) == 240
    assert raw[0][0] == 0
    assert raw[-1][0] == 100


def test_losses_that_are_not_finite_are_left_out() -> None:
    panel = curve_panel("Loss", [0, 1, 2, 3], [2.0, math.nan, math.inf, 1.0])
    assert panel is not None
    assert len(points_of(panel.raw)) == 2


@pytest.mark.parametrize("losses", [[], [1.0], [math.nan, 1.0]], ids=["none", "one", "one-finite"])
def test_nothing_is_drawn_of_less_than_two_points(losses: list[float]) -> None:
    assert curve_panel("Loss", [float(i) for i in range(len(losses))], losses) is None


def test_a_flat_curve_has_an_axis() -> None:
    panel = curve_panel("Loss", [0, 10], [0.0, 0.0])
    assert panel is not None
    assert all(math.isfinite(y) for _, y in points_of(panel.path))
