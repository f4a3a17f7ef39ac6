"""Commands without a recipe file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_stage import FakeStage, Invoke, only_json

from evatool.recipe.load import load_recipe
from evatool.recipe.write import to_table


def resolved(invoke: Invoke, *arguments: object) -> dict[str, Any]:
    return only_json(invoke(*arguments, "--dry-run", "--json"))


def test_eval(invoke: Invoke) -> None:
    said = resolved(invoke, "eval", "runs/demo/distill", "--suite", "drawings", "--data", "sets")
    section = said["recipe"]["eval"]
    assert section["models"] == {"distill": "runs/demo/distill"}
    assert (section["suite"], section["data"]) == ("drawings", "sets")
    assert said["run_dir"] == "runs/eval-distill"
    assert said["origins"]["eval.data"] == "command line"
    assert said["origins"]["eval.batch_size"] == "default"


def test_export(invoke: Invoke) -> None:
    said = resolved(invoke, "export", "runs/demo/distill/", "--to", "open_clip", "--out", "student")
    assert said["recipe"]["export"]["checkpoint"] == "runs/demo/distill/"
    assert said["recipe"]["export"]["format"] == "open_clip"
    assert said["run_dir"] == "student"


def test_data_prepare(invoke: Invoke) -> None:
    said = resolved(invoke, "data-prepare", "photos", "--captions", "photos/c.csv", "--set", "data.caption_column=text")
    data = said["recipe"]["data"]
    assert (data["kind"], data["images"], data["captions"]) == ("folder", "photos", "photos/c.csv")
    assert data["caption_column"] == "text"


def test_train_clip(invoke: Invoke) -> None:
    said = resolved(invoke, "train-clip", "EVA02-CLIP-toy", "--data", "shards", "--samples-seen", 5120)
    assert said["recipe"]["model"]["preset"] == "EVA02-CLIP-toy"
    assert said["derived"]["steps"] == 20
    assert said["derived"]["warmup_steps"] == 2


def test_defaults_are_those_that_the_help_states(invoke: Invoke) -> None:
    said = resolved(invoke, "pretrain-mim", "EVA02-CLIP-toy", "--teacher", "t", "--data", "d")["recipe"]
    page = " ".join(invoke("pretrain-mim", "--help").stdout.split())
    assert f"Default: {said['train']['samples_seen']}" in page
    assert f"batch {said['train']['global_batch_size']}" in page
    assert f"AdamW at {said['optim']['visual']['lr'] * 1e3:g}e-3" in page
    assert f"clipped at {said['optim']['grad_clip_norm']:g}" in page
    clip = resolved(invoke, "distill", "EVA02-CLIP-toy", "--teacher", "t", "--data", "d")["recipe"]
    page = " ".join(invoke("distill", "--help").stdout.split())
    assert f"AdamW at {clip['optim']['text']['lr'] * 1e4:g}e-4" in page
    assert f"clipped at {clip['optim']['grad_clip_norm']:g}" in page


def test_distill(invoke: Invoke) -> None:
    said = resolved(invoke, "distill", "EVA02-CLIP-toy-small", "--teacher", "runs/t", "--data", "d")
    assert said["recipe"]["teacher"]["model"] == "runs/t"


def test_the_folder_of_data_prepare_stands_for_its_parts(invoke: Invoke) -> None:
    Path("runs/data/train").mkdir(parents=True)
    Path("runs/data/eval").mkdir()
    train = resolved(invoke, "train-clip", "EVA02-CLIP-toy", "--data", "runs/data")
    assert train["recipe"]["data"]["train"] == "runs/data/train"
    evaluation = resolved(invoke, "eval", "m", "--data", "runs/data")
    assert evaluation["recipe"]["eval"]["data"] == "runs/data/eval"


def test_a_short_form_writes_the_recipe_it_stands_for(invoke: Invoke, stage: FakeStage) -> None:
    said = only_json(invoke("eval", "runs/my model", "--data", "d", "--json"))
    path = Path(said["run_dir"]) / "resolved.toml"
    assert path == Path("runs/eval-my-model/resolved.toml")
    assert load_recipe(path).recipe == stage.recipes[0]
    assert resolved(invoke, "eval", path)["recipe"] == to_table(stage.recipes[0])


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["eval", "m"], "--data"),
        (["data-prepare", "photos"], "--captions"),
        (["train-clip", "P"], "--data"),
        (["pretrain-mim", "P", "--samples-seen", "3"], "--teacher and --data"),
        (["distill", "P", "--data", "d"], "--teacher"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_missing_options_are_named_together(invoke: Invoke, arguments: list[str], missing: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert f"needs {missing}\n" in result.stderr


def test_a_misspelt_recipe_is_told_from_a_model(invoke: Invoke) -> None:
    result = invoke("eval", "demo/evl")
    assert result.exit_code == 2
    assert "such as demo/eval" in result.stderr


def test_a_missing_file_is_a_recipe_error_not_a_model(invoke: Invoke) -> None:
    result = invoke("eval", "gone.toml", "--data", "d")
    assert result.exit_code == 2


def test_options_beside_a_recipe_are_refused(invoke: Invoke) -> None:
    result = invoke("eval", "demo/eval", "--suite", "drawings", "--data", "d")
    assert result.exit_code == 2
    assert "--suite and --data cannot stand beside a recipe" in result.stderr
    assert "--set" in result.stderr


def test_an_argument_that_is_both_names_both(invoke: Invoke) -> None:
    Path("demo/eval").mkdir(parents=True)
    result = invoke("eval", "demo/eval")
    assert result.exit_code == 2
    assert str(Path("demo/eval").resolve()) in result.stderr
    assert "recipes/demo/eval.toml" in result.stderr
    said = resolved(invoke, "eval", "./demo/eval", "--data", "d")
    assert said["recipe"]["eval"]["models"] == {"eval": "./demo/eval"}
