"""What the house asks of itself, held by the figures of `tests/helpers/house_report.py`."""

from __future__ import annotations

import pytest
from house_report import ROOT, House, inspect

# Public names with two homes, each with its reason.
TWICE = {
    "run": "each stage's entry has the same name, which run_stage calls",
    "main": "the entry of a process of its own",
    "MimObjective": "a recipe section and the class that is built from it share one word",
}
# Functions over 60 lines that read better whole.
LONG = {"evatool/data/train/loader.py: build_train_loader"}  # 38 lines of it say what it takes


@pytest.fixture(scope="module")
def house() -> House:
    return inspect(ROOT)


def test_every_citation_can_be_followed(house: House) -> None:
    assert house.dangling == []


def test_the_old_vocabulary_is_gone(house: House) -> None:
    assert house.identifiers == {}
    assert house.modules == []
    assert house.recipe_keys == []


def test_a_public_name_has_one_home(house: House) -> None:
    assert {name: places for name, places in house.twice.items() if name not in TWICE} == {}


def test_no_function_is_longer_than_a_screen(house: House) -> None:
    assert [found for found in house.long_functions if found.split(" (")[0] not in LONG] == []
