"""`extends`, `unset`, precedence and what cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from evatool.core.errors import RecipeError
from evatool.recipe import load
from evatool.recipe.load import find_recipes_dir, is_recipe, list_recipes, load_recipe, resolve_table

Write = Callable[[str, str], Path]


def test_precedence_is_defaults_bases_left_to_right_file_and_set(train_clip: Path, write: Write) -> None:
    write("fast.toml", "train.seed = 1\ntrain.log_every = 1\n[checkpoint]\nkeep = 5\n")
    child = write("child.toml", 'extends = ["mine.toml", "fast.toml"]\ntrain.seed = 2\n')
    resolved = load_recipe(child, ["checkpoint.keep=7", "checkpoint.keep=8"])
    recipe = resolved.recipe
    assert (recipe.train.seed, recipe.train.log_every, recipe.checkpoint.keep) == (2, 1, 8)
    expected = {
        "train.samples_seen": "mine.toml",
        "train.log_every": "fast.toml",
        "train.seed": "child.toml",
        "checkpoint.keep": "--set",
        "train.precision": "default",
    }
    assert {key: resolved.origins[key] for key in expected} == expected


def test_bases_are_found_relative_to_the_file_that_extends_them(train_clip: Path, write: Write) -> None:
    write("a/b/child.toml", 'extends = "../middle.toml"\n')
    write("a/middle.toml", 'extends = "../mine.toml"\ntrain.seed = 3\n')
    assert load_recipe("a/b/child.toml").recipe.train.seed == 3


def test_paths_in_a_recipe_stay_as_typed(train_clip: Path, write: Write) -> None:
    write("a/child.toml", 'extends = "../mine.toml"\n')
    assert load_recipe("a/child.toml").recipe.data.train == Path("shards")


def test_a_shipped_recipe_can_be_extended_by_name(write: Write) -> None:
    write("child.toml", 'extends = "demo/train-clip"\n[train]\nseed = 77\n')
    resolved = load_recipe("child.toml")
    assert resolved.recipe.train.seed == 77
    assert resolved.recipe.model == load_recipe("demo/train-clip").recipe.model


def test_a_table_whose_kind_changes_replaces_the_old_one(train_clip: Path, write: Write) -> None:
    write("init.toml", 'extends = "mine.toml"\nmodel.init = {kind = "clip", path = "a"}\n')
    write("none.toml", 'extends = "init.toml"\nmodel.init.kind = "none"\n')
    write("other.toml", 'extends = "init.toml"\nmodel.init.path = "b"\n')
    assert load_recipe("none.toml").recipe.model.init.kind == "none"  # `path` would be refused if it lingered
    assert load_recipe("other.toml").recipe.model.init.model_dump(exclude_none=True) == {
        "kind": "clip",
        "path": Path("b"),
    }


def test_arrays_replace(train_clip: Path, write: Write) -> None:
    write("child.toml", 'extends = "mine.toml"\noptim.betas = [0.5, 0.6]\n')
    assert load_recipe("child.toml").recipe.optim.betas == (0.5, 0.6)


def test_unset_drops_a_value_of_a_base(train_clip: Path, write: Write) -> None:
    write("clipped.toml", 'extends = "mine.toml"\noptim.grad_clip_norm = 1.0\n')
    write("free.toml", 'extends = "clipped.toml"\nunset = ["optim.grad_clip_norm"]\n')
    resolved = load_recipe("free.toml")
    assert resolved.recipe.optim.grad_clip_norm is None
    assert "optim.grad_clip_norm" not in resolved.origins
    assert load_recipe("clipped.toml", ['unset=["optim.grad_clip_norm"]']).recipe.optim.grad_clip_norm is None


def test_unset_of_a_key_that_no_base_sets_is_refused(train_clip: Path, write: Write) -> None:
    write("child.toml", 'extends = "mine.toml"\nunset = ["train.sed", "train.samples_sen"]\n')
    with pytest.raises(RecipeError) as caught:
        load_recipe("child.toml")
    assert caught.value.problems == [
        'child.toml: unset = ["train.sed"] names a key that no base sets',
        'child.toml: unset = ["train.samples_sen"] names a key that no base sets; did you mean train.samples_seen?',
    ]


def test_unset_of_an_unknown_key_hides_no_other_problem(train_clip: Path, write: Write) -> None:
    write("child.toml", 'extends = "mine.toml"\nunset = ["train.sed"]\ntrain.samples_seen = "many"\n')
    with pytest.raises(RecipeError) as caught:
        load_recipe("child.toml", ['unset=["gone"]'])
    keys = [line.split(": ")[1].split(" =")[0] for line in caught.value.problems]
    assert keys == ["unset", "unset", "train.samples_seen"]


def test_two_recipes_may_share_a_base(train_clip: Path, write: Write) -> None:
    write("left.toml", 'extends = "mine.toml"\ntrain.seed = 1\n')
    write("right.toml", 'extends = "mine.toml"\ntrain.log_every = 3\n')
    write("both.toml", 'extends = ["left.toml", "right.toml"]\n')
    train = load_recipe("both.toml").recipe.train
    assert (train.seed, train.log_every) == (1, 3)


def test_a_circle_is_refused_and_shown(write: Write) -> None:
    write("a.toml", 'extends = "b.toml"\n')
    write("b.toml", 'extends = "c.toml"\n')
    write("c.toml", 'extends = "b.toml"\n')
    with pytest.raises(RecipeError, match="circle") as caught:
        load_recipe("a.toml")
    assert caught.value.where == "b.toml -> c.toml -> b.toml"


@pytest.mark.parametrize(
    ("text", "what", "where"),
    [
        ('stage = "eval"\nx = [1,\ny = 2\n', "not valid TOML", "bad.toml, line 3"),
        ('x = "', "not valid TOML", "bad.toml, end of file"),
        ('extends = "gone.toml"', "extends = 'gone.toml'", "bad.toml"),
        ('extends = "demo/gone"', "extends = 'demo/gone'", "bad.toml"),
        ("extends = 3", "extends = 3", "bad.toml"),
        ("train.seed = 1", "names no stage", "bad.toml"),
        ('stage = "evall"', "is no stage", "bad.toml"),
    ],
    ids=["syntax", "unterminated", "base-file", "base-name", "extends-type", "no-stage", "wrong-stage"],
)
def test_what_cannot_be_read_is_named_with_its_place(write: Write, text: str, what: str, where: str) -> None:
    path = write("bad.toml", text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert what in caught.value.what
    assert caught.value.where == where


def test_text_that_is_not_utf8_is_named(write: Write) -> None:
    path = write("bad.toml", "")
    path.write_bytes(b'source = "caf\xe9"')
    with pytest.raises(RecipeError, match="UTF-8") as caught:
        load_recipe(path)
    assert caught.value.where == "bad.toml, byte 13"


def test_a_byte_order_mark_is_accepted(train_clip: Path) -> None:
    train_clip.write_bytes(b"\xef\xbb\xbf" + train_clip.read_bytes())
    assert load_recipe(train_clip).recipe.stage == "train-clip"


def test_a_recipe_of_another_stage_is_refused_with_the_right_command(train_clip: Path) -> None:
    with pytest.raises(RecipeError, match="a recipe for train-clip, not for eval") as caught:
        load_recipe(train_clip, stage="eval")
    assert "evatool train-clip" in str(caught.value.fix)


def test_a_misspelt_name_gets_the_nearest_shipped_one(write: Write) -> None:
    with pytest.raises(RecipeError, match="demo/train-clp") as caught:
        load_recipe("demo/train-clp")
    assert "demo/train-clip" in str(caught.value.expected)


def test_names_and_paths_are_told_apart(write: Write) -> None:
    assert is_recipe("demo/train-clip")
    assert is_recipe("anything.toml")
    assert not is_recipe("./demo/train-clip")
    assert not is_recipe("../recipes/demo/train-clip")
    assert not is_recipe("EVA02-CLIP-B-16")
    assert not is_recipe("")


@pytest.mark.parametrize(
    ("path", "name"),
    [("mine.toml", "mine"), ("runs/first/resolved.toml", "first")],
    ids=["file", "resolved"],
)
def test_the_run_is_named_after_the_recipe(train_clip: Path, write: Write, path: str, name: str) -> None:
    write(path, train_clip.read_text())
    assert load_recipe(path).name == name


def test_a_shipped_recipe_keeps_its_name_when_given_by_path() -> None:
    assert load_recipe(find_recipes_dir() / "demo" / "train-clip.toml").name == "demo/train-clip"


def test_every_shipped_recipe_resolves() -> None:
    rows = list_recipes()
    assert {"demo/data-prepare", "demo/train-clip", "demo/eval"} <= {name for name, _, _ in rows}
    for name, stage, source in rows:
        resolved = load_recipe(name, stage=stage)
        assert resolved.recipe.stage == stage
        assert source, f"{name} does not say where its figures come from"


def test_a_table_resolves_like_a_file() -> None:
    table = {"export": {"checkpoint": "runs/x", "format": "open_clip"}}
    resolved = resolve_table(table, "export", overrides=["export.tolerance=1e-4"])
    assert resolved.recipe.export.tolerance == 1e-4
    assert resolved.origins["export.checkpoint"] == "command line"
    assert resolved.origins["export.tolerance"] == "--set"
    assert resolved.path is None


def test_an_installed_package_brings_its_own_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "site" / "evatool" / "recipe" / "load.py"
    module.parent.mkdir(parents=True)
    monkeypatch.setattr(load, "__file__", str(module))
    assert find_recipes_dir() == tmp_path / "site" / "recipes"
    (tmp_path / "site" / "evatool" / "_recipes" / "demo").mkdir(parents=True)
    shipped = tmp_path / "site" / "evatool" / "_recipes" / "demo" / "export.toml"
    shipped.write_text('stage = "export"\nsource = "s"\nexport.checkpoint = "c"\n')
    assert list_recipes() == [("demo/export", "export", "s")]
    assert load_recipe("demo/export").origins["source"] == "shipped demo/export.toml"
