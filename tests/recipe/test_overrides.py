"""`--set key=value`."""

from __future__ import annotations

from pathlib import Path

import pytest

from evatool.core.errors import EvatoolError, RecipeError, UsageError
from evatool.recipe.load import load_recipe, resolve_table


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("runs/x", "runs/x"),
        ('"quoted"', "quoted"),
        ("2024-01-01", "2024-01-01"),
        ("a = b", "a = b"),
        ("", ""),
        ("two\nlines = 1", "two\nlines = 1"),
        ("1\nstage = 2", "1\nstage = 2"),
        ("naïve – café", "naïve – café"),
    ],
    ids=["path", "quoted", "date", "equals", "empty", "line-break", "second-key", "unicode"],
)
def test_what_is_not_toml_is_text(train_clip: Path, text: str, value: str) -> None:
    assert load_recipe(train_clip, [f"source={text}"]).recipe.source == value


def test_values_are_toml(train_clip: Path) -> None:
    given = ["train.seed=7", "optim.eps=1e-8", "optim.betas=[0.8, 0.9]", 'model.init={kind="clip", path="x"}']
    recipe = load_recipe(train_clip, given).recipe
    assert (recipe.train.seed, recipe.optim.eps, recipe.optim.betas) == (7, 1e-8, (0.8, 0.9))
    assert recipe.model.init.path == Path("x")


def test_the_last_of_equal_keys_wins(train_clip: Path) -> None:
    assert load_recipe(train_clip, ["train.seed=1", "train.seed=2"]).recipe.train.seed == 2


@pytest.mark.parametrize("order", [1, -1], ids=["kind-first", "path-first"])
def test_a_changed_kind_keeps_what_the_same_command_sets(train_clip: Path, order: int) -> None:
    given = ["model.init.kind=image-tower", "model.init.path=runs/mim"][::order]
    assert load_recipe(train_clip, given).recipe.model.init.path == Path("runs/mim")


def test_keys_can_be_quoted() -> None:
    table = {"eval": {"models": {"a": "x"}, "data": "d"}}
    recipe = resolve_table(table, "eval", overrides=['eval.models."my model v1.2"=runs/y']).recipe
    assert recipe.eval.models == {"a": "x", "my model v1.2": "runs/y"}


@pytest.mark.parametrize(
    "text", ["train.seed", "=1", "a..b=1", "a b=1", "a\nb=1", "source=\udcff", "extends=x", ""], ids=repr
)
def test_what_cannot_be_read_is_a_usage_error(train_clip: Path, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(train_clip, [text])
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("train.seed=yes", '--set: train.seed = "yes": expected a whole number'),
        ("train.seed.x=1", "--set: train.seed = { x = 1 }: expected a whole number"),
        (
            "train.precision=bf61",
            '--set: train.precision = "bf61": expected "fp32", "bf16" or "fp16"; did you mean "bf16"?',
        ),
        ("optim.eps=inf", "--set: optim.eps = inf: expected a finite number"),
        ("train.samples_sen=1", "--set: train.samples_sen = 1: unknown key; did you mean train.samples_seen?"),
    ],
    ids=["type", "table", "choice", "infinite", "typo"],
)
def test_a_bad_value_is_put_down_to_the_command_line(train_clip: Path, text: str, problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(train_clip, [text])
    assert problem in caught.value.problems


def test_another_stage_cannot_be_set(train_clip: Path) -> None:
    with pytest.raises(EvatoolError, match="a recipe for distill, not for train-clip"):
        load_recipe(train_clip, ["stage=distill"], stage="train-clip")
