"""Suites as data files, the choice of sets, and finding their folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from evatool.errors import DataError, RecipeError
from evatool.eval.suite import find_sets, list_suites, load_suite


@pytest.mark.parametrize("name", list_suites())
def test_every_suite_file_is_whole(name: str) -> None:
    suite = load_suite(name)
    names = [s.name for s in suite.sets]
    assert suite.name == name
    assert len(set(names)) == len(names) > 0
    assert sum(s.headline for s in suite.sets) <= 1


def test_the_drawings_are_the_six_sets_and_retrieval() -> None:
    suite = load_suite("drawings")
    expected = ["new-artist", "new-shading", "black-and-white", "never-seen", "coarse-group", "coarse-subgroup"]
    assert [s.name for s in suite.sets] == [*expected, "retrieval"]


def test_an_unknown_suite_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'drawings'"):
        load_suite("drawing")


def test_sets_are_chosen_in_the_order_of_the_suite() -> None:
    suite = load_suite("drawings")
    assert [s.name for s in suite.chosen(["retrieval", "new-artist"])] == ["new-artist", "retrieval"]
    assert suite.chosen(None) == suite.sets


def test_all_unknown_sets_are_named_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        load_suite("drawings").chosen(["new-artists", "zebra", "retrieval"])
    assert len(caught.value.problems) == 2
    assert "did you mean 'new-artist'" in caught.value.problems[0]


def test_an_empty_choice_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"eval\.sets is empty"):
        load_suite("drawings").chosen([])


@pytest.mark.parametrize("below", ["", "eval"], ids=["folder-of-sets", "run-folder"])
def test_sets_are_found_in_their_folder_or_in_a_run_folder(tmp_path: Path, below: str) -> None:
    (tmp_path / below / "new-artist").mkdir(parents=True)
    suite = load_suite("drawings")
    paths = find_sets(tmp_path, suite, suite.sets)
    assert paths["new-artist"] == tmp_path / below / "new-artist"
    assert len(paths) == 7


def test_a_missing_folder_names_the_command_that_makes_it(tmp_path: Path) -> None:
    suite = load_suite("drawings")
    with pytest.raises(DataError, match="no folder") as caught:
        find_sets(tmp_path / "nowhere", suite, suite.sets)
    assert suite.prepare in (caught.value.fix or "")


def test_a_folder_without_any_set_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "holiday").mkdir()
    suite = load_suite("drawings")
    with pytest.raises(DataError, match="none of the evaluation sets") as caught:
        find_sets(tmp_path, suite, suite.sets)
    assert "holiday" in (caught.value.expected or "")
