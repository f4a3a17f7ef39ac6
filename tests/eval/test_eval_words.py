"""What is said of numbers: never a gain whose interval includes 0."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import made_up_results

from evatool.eval.intervals import Interval
from evatool.eval.report import wording

NB = wording.NO_BREAK


@pytest.mark.parametrize(
    ("share", "text"), [(0.0741, "7.4 %"), (0.0, "0.0 %"), (1.0, "100.0 %"), (0.00137, "0.14 %"), (0.0049, "0.49 %")]
)
def test_percent(share: float, text: str) -> None:
    assert wording.percent(share) == text.replace(" ", NB)


def test_bounds_have_as_many_digits_as_their_value() -> None:
    assert wording.bounds(Interval(0.084, 0.0634, 0.1056)) == f"[6.3,{NB}10.6]"
    assert wording.bounds(Interval(0.0014, 0.0, 0.0041)) == f"[0.00,{NB}0.41]"


@pytest.mark.parametrize(
    ("difference", "text"),
    [
        (Interval(0.018, 0.003, 0.034), "+1.8 [0.3, 3.4]"),
        (Interval(-0.02, -0.035, -0.008), "−2.0 [−3.5, −0.8]"),
        (Interval(0.0, -0.01, 0.01), "0.0 [−1.0, 1.0]"),
        (Interval(0.02, 0.0003, 0.04), "+2.0 [0.03, 4.0]"),
    ],
    ids=["gain", "loss", "nothing", "bound-near-zero"],
)
def test_points(difference: Interval, text: str) -> None:
    assert wording.points(difference).replace(NB, " ") == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0.4 s"), (48.3, "48 s"), (59.9, "1 min 00 s"), (425, "7 min 05 s"), (11520, "3 h 12 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert wording.duration(seconds) == text


@given(st.floats(-1, 1), st.floats(0, 0.5), st.floats(0, 0.5))
def test_a_gain_or_loss_is_never_said_of_an_interval_with_zero(value: float, below: float, above: float) -> None:
    low, high = value - below, value + above
    results = made_up_results(differences=[(value, low, high)])
    text = " ".join(wording.step_sentences(results, "first", "second"))
    assert ("Gained" in text) == (low > 0)
    assert ("Lost" in text) == (high < 0)
    assert ("No clear difference" in text) == (low <= 0 <= high)
    assert wording.points(Interval(value, low, high)) in text


def test_models_that_share_no_set_are_not_compared() -> None:
    assert wording.step_sentences(made_up_results(differences=[(0.1, 0.0, 0.2)]), "second", "first") == []


def test_the_headline_counts_pictures_and_says_how_far_from_chance() -> None:
    text = wording.headline(made_up_results(), "second", "the student") or ""
    assert text.startswith("On the new artist, the model “the student” names 58 of 729 pictures right")
    assert "58 times chance" in text


def test_the_headline_claims_nothing_near_chance() -> None:
    results = made_up_results({"only": (0.0027, 0.0, 0.0069)})
    assert "cannot be told from chance" in (wording.headline(results, "only", "only") or "")


def test_the_headline_needs_the_headline_set() -> None:
    results = made_up_results()
    results.results.clear()
    assert wording.headline(results, "second", "second") is None


def test_luck_is_counted() -> None:
    assert "Of 40 comparisons about 2.0 would do so by luck" in wording.caveats(made_up_results(), 40)[1]
    assert len(wording.caveats(made_up_results(), 0)) == 1


@pytest.mark.parametrize(
    ("n", "classes", "share", "shown"),
    [(849, 5, 0.41, True), (729, 729, 1 / 729, False), (1297, 729, 2 / 1297, False), (100, 5, 0.2, False)],
    ids=["unbalanced", "one-picture-a-class", "two-pictures-a-class", "balanced"],
)
def test_the_largest_class_is_mentioned_where_it_matters(n: int, classes: int, share: float, shown: bool) -> None:
    from evatool.eval.results import SetRecord

    record = SetRecord("s", "S", "s", "", "classification", "v", n, classes, share)
    assert ("largest class" in wording.set_facts(record, 1 / classes)) is shown
