"""Recipe keys that have another name today are read wherever an older recipe, run or command line has them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from evatool.core.errors import RecipeError
from evatool.core.renamed_keys import RECIPE_KEYS, rename_recipe_keys, renamed_recipe_key
from evatool.recipe.load import load_recipe, note_renamed
from evatool.recipe.problems import schema_keys
from evatool.recipe.schema import RECIPES
from evatool.recipe.write import dotted, to_toml

Write = Callable[..., Path]

MIM = """
stage = "pretrain-mim"
data.train = "shards"
model.preset = "EVA02-CLIP-toy"
teacher.model = "EVA02-CLIP-toy"
optim.visual.lr = 1e-3
train.samples_seen = 1000
train.global_batch_size = 10
"""
OLD = 'data.odd_pictures = "convert"\n[pictures]\nnum_pictures = 3\nevery_steps = 20\n'


@pytest.fixture(autouse=True)
def _notes_are_told_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test is a process of its own to the notes; the package's records reach pytest."""
    monkeypatch.setattr(logging.getLogger("evatool"), "propagate", True)
    note_renamed.cache_clear()
    yield
    note_renamed.cache_clear()


def read(recipe) -> tuple[str, int, int | None]:
    return recipe.data.nonstandard, recipe.images.num_images, recipe.images.every_steps


def test_every_key_of_the_table_leads_to_one_that_exists() -> None:
    """A table's new name, or a key below a table under today's name; and no old name is in use again."""
    known = {dotted(key.path) for model in RECIPES.values() for key in schema_keys(model)}
    for old, new in RECIPE_KEYS.items():
        assert new in known
        assert old not in known
        assert renamed_recipe_key(old) == new


def test_a_file_may_have_old_names(write: Write) -> None:
    assert read(load_recipe(write("old.toml", MIM + OLD)).recipe) == ("convert", 3, 20)


def test_a_base_may_have_old_names_and_the_file_over_it_new_ones(write: Write) -> None:
    write("base.toml", MIM + OLD)
    over = write("mine.toml", 'extends = "base.toml"\n[images]\nnum_images = 5\n')
    assert read(load_recipe(over).recipe) == ("convert", 5, 20)


def test_a_file_with_old_names_lies_over_a_base_with_new_ones(write: Write) -> None:
    write("base.toml", MIM + "[images]\nnum_images = 5\nevery_steps = 7\n")
    over = write("mine.toml", 'extends = "base.toml"\n[pictures]\nnum_pictures = 3\n')
    assert load_recipe(over).recipe.images.model_dump() == {"num_images": 3, "every_steps": 7}


@pytest.mark.parametrize("key", ["pictures.num_pictures", "images.num_pictures", "images.num_images"])
def test_unset_drops_a_base_s_value_by_either_name(write: Write, key: str) -> None:
    write("base.toml", MIM + OLD)
    over = write("mine.toml", f'extends = "base.toml"\nunset = ["{key}"]\n')
    assert read(load_recipe(over).recipe) == ("convert", 6, 20)


def test_set_takes_old_names(write: Write) -> None:
    overrides = ["pictures.num_pictures=4", "data.odd_pictures=convert"]
    resolved = load_recipe(write("new.toml", MIM), overrides)
    assert read(resolved.recipe) == ("convert", 4, None)
    assert resolved.origins["images.num_images"] == "--set"


def test_the_resolved_recipe_of_an_older_run_is_read_and_written_under_new_names(write: Write) -> None:
    today = load_recipe(write("new.toml", MIM), ["images.num_images=3", "data.nonstandard=convert"]).recipe
    older = to_toml(today).replace("[images]", "[pictures]").replace("num_images", "num_pictures")
    older = older.replace("nonstandard", "odd_pictures")
    found = load_recipe(write("runs/older/resolved.toml", older)).recipe
    assert found == today
    assert to_toml(found) == to_toml(today)


@pytest.mark.parametrize(
    ("extra", "keys"),
    [
        ("[images]\nnum_images = 3\nnum_pictures = 4\n", "images.num_pictures and images.num_images"),
        ("[images]\nnum_images = 3\n[pictures]\nevery_steps = 4\n", "pictures and images"),
        ('[data]\nodd_pictures = "skip"\nnonstandard = "skip"\n', "data.odd_pictures and data.nonstandard"),
    ],
    ids=["in one table", "both tables", "another table"],
)
def test_one_key_under_both_names_is_an_error(write: Write, extra: str, keys: str) -> None:
    text = MIM.replace('data.train = "shards"\n', "") + extra.replace("[data]", '[data]\ntrain = "shards"')
    if "[data]" not in extra:
        text += '[data]\ntrain = "shards"\n'
    with pytest.raises(RecipeError) as caught:
        load_recipe(write("both.toml", text))
    assert caught.value.problems == [f"both.toml: {keys} are one key under two names; keep the second"]


def test_a_name_is_told_once(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    path = write("old.toml", MIM + OLD)
    with caplog.at_level(logging.INFO, logger="evatool"):
        for _ in range(3):
            load_recipe(path)
    told = [record.message for record in caplog.records if "is called" in record.message]
    assert told == [
        "old.toml: pictures is called images now",
        "old.toml: images.num_pictures is called images.num_images now",
        "old.toml: data.odd_pictures is called data.nonstandard now",
    ]


def test_what_is_no_table_stays_for_the_schema_to_refuse() -> None:
    table = {"images": 3, "data": {"train": "x"}}
    assert rename_recipe_keys(table) == ([], [])
    assert table == {"images": 3, "data": {"train": "x"}}
