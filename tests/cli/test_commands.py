"""What commands print, where, and their exit codes."""

from __future__ import annotations

import errno
import json
import re
import tomllib
from pathlib import Path

import pytest
from fake_stage import FakeStage, Invoke, only_json

from evatool.cli.app import app
from evatool.core.errors import BadDataLimitError, DataError, NumericalError, Preempted
from evatool.recipe.load import load_recipe
from evatool.recipe.schema import RECIPES

_STAGES = list(RECIPES)
_STAGES.insert(_STAGES.index("distill") + 1, "store-features")
COMMANDS = [*_STAGES, "demo", "recipe", "compare", "inspect", "plan", "suites"]


def test_help_lists_the_stages_in_pipeline_order(invoke: Invoke) -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    lines = result.stdout.split("Commands:")[1].split("Examples:")[0].splitlines()
    assert [line.split()[0] for line in lines if line.strip()] == COMMANDS


def test_help_of_commands_is_not_cut_off(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    listed = invoke("--help").stdout.split("Commands:")[1]
    assert "..." not in listed


@pytest.mark.parametrize("command", [*COMMANDS, "recipe list", "recipe show", "recipe check"])
def test_help_opens_with_a_sentence_and_ends_with_two_examples(invoke: Invoke, command: str) -> None:
    lines = [line.strip() for line in invoke(*command.split(), "--help").stdout.splitlines() if line.strip()]
    assert lines[0].startswith("Usage:")
    assert lines[1].endswith(".")
    assert lines[-3] == "Examples:"
    assert all(line.startswith("evatool ") for line in lines[-2:])


@pytest.mark.parametrize("stage", RECIPES)
def test_the_flags_of_every_stage_are_these(invoke: Invoke, stage: str) -> None:
    """Knobs belong in the recipe: a new flag is a decision, not an accident."""
    page = invoke(stage, "--help").stdout
    flags = {word for line in page.split("Options:")[1].split("Examples:")[0].splitlines() for word in line.split()[:2]}
    flags = {word.strip(",") for word in flags if word.startswith("--")}
    common = {"--set", "--run-dir", "--resume", "--dry-run", "--json", "--debug", "--help"}
    short = {
        "data-prepare": {"--captions"},
        "pretrain-mim": {"--teacher", "--data", "--samples-seen", "--accept-drift"},
        "train-clip": {"--data", "--samples-seen", "--accept-drift"},
        "distill": {"--teacher", "--data", "--samples-seen", "--accept-drift"},
        "export": {"--to", "--model-config", "--push-to-hub", "--quantize", "--out"},
        "eval": {"--suite", "--data"},
    }
    assert flags == common | short[stage]


def test_examples_in_help_name_recipes_that_exist() -> None:
    words = {word for command in app.registered_commands for word in (command.epilog or "").split()}
    named = {word for word in words if word.startswith("demo/")}
    assert len(named) >= 3
    for word in named:
        assert load_recipe(word).name == word


def test_version(invoke: Invoke) -> None:
    assert invoke("--version").stdout.startswith("evatool 0.")


def test_a_stage_prints_table_places_and_next_command(invoke: Invoke, stage: FakeStage) -> None:
    result = invoke("export", "demo/export")
    assert result.exit_code == 0
    for text in ("new-artist", "25 %", "runs/demo/export/weights", "next: evatool eval ..."):
        assert text in result.stdout
    assert Path("runs/demo/export/status.json").is_file()


def test_json_prints_the_result_and_nothing_else(invoke: Invoke, stage: FakeStage) -> None:
    stage.body = lambda path: print("chatter of a library")
    result = invoke("export", "demo/export", "--json")
    assert only_json(result) == {
        "stage": "export",
        "run_dir": "runs/demo/export",
        "outputs": {"weights": "runs/demo/export/weights"},
        "metrics": {"top1": 0.25, "bad": None},
        "next_command": "evatool eval ...",
    }
    assert "chatter" in result.stderr


FAILURES = [
    (DataError("no pictures", where="photos/", fix="look again"), 1, "failed", "no pictures"),
    (BadDataLimitError("3 of 10 are bad"), 78, "failed", "3 of 10 are bad"),
    (NumericalError("not finite"), 80, "failed", "not finite"),
    (Preempted("stopped by SIGTERM"), 75, "preempted", "stopped by SIGTERM"),
    (KeyboardInterrupt(), 130, "interrupted", "stopped by Ctrl-C"),
    (OSError(errno.ENOSPC, "No space left on device", "runs/x/00001.tar"), 76, "failed", "the disk is full"),
    (PermissionError(errno.EACCES, "Permission denied", "secret"), 1, "failed", "permission denied"),
    (ValueError("a bug\nwith details"), 1, "failed", "internal error: ValueError: a bug"),
]


@pytest.mark.parametrize(("error", "code", "state", "text"), FAILURES, ids=lambda x: type(x).__name__)
def test_failures_have_a_message_a_code_and_a_status(
    invoke: Invoke, stage: FakeStage, error: BaseException, code: int, state: str, text: str
) -> None:
    def fail(path: Path) -> None:
        raise error

    stage.body = fail
    result = invoke("export", "demo/export")
    assert result.exit_code == code
    assert result.stdout == ""
    assert f"error: {text}" in result.stderr
    assert "Traceback" not in result.stderr
    status = json.loads(Path("runs/demo/export/status.json").read_text())
    assert (status["state"], status["exit_code"]) == (state, code)
    assert "Traceback" in Path("runs/demo/export/logs/rank_00000.log").read_text()

    said = only_json(invoke("export", "demo/export", "--json", "--run-dir", "again"))
    assert said["exit_code"] == code
    assert text in said["error"]["message"]


def test_the_parts_of_an_error_are_shown_and_in_the_json(invoke: Invoke, stage: FakeStage) -> None:
    def fail(path: Path) -> None:
        raise DataError("no pictures", where="photos/", expected="some", fix="look again")

    stage.body = fail
    result = invoke("export", "demo/export", "--json")
    assert "error: no pictures\nwhere: photos/\nexpected: some\nnext: look again\n" in result.stderr
    expected = {
        "type": "DataError",
        "message": "no pictures",
        "where": "photos/",
        "expected": "some",
        "next": "look again",
    }
    assert only_json(result)["error"] == expected


def test_debug_shows_the_trace(invoke: Invoke, stage: FakeStage) -> None:
    def fail(path: Path) -> None:
        raise ValueError("a bug")

    stage.body = fail
    assert "Traceback" in invoke("export", "demo/export", "--debug").stderr


def test_a_recipe_error_lists_its_problems(invoke: Invoke) -> None:
    result = invoke("train-clip", "demo/train-clip", "--set", "train.sed=1", "--set", "train.seed=x", "--json")
    assert result.exit_code == 2
    said = only_json(result)
    assert said["exit_code"] == 2
    assert said["error"]["type"] == "RecipeError"
    assert len(said["error"]["problems"]) == 2
    assert "  --set: train.sed = 1: unknown key; did you mean train.seed?\n" in result.stderr


def test_usage_errors_of_the_command_line_exit_2(invoke: Invoke) -> None:
    for arguments in (["eval"], ["evl", "x"], ["eval", "x", "--nonsense"], ["demo", "--seed", "x"]):
        result = invoke(*arguments)
        assert (result.exit_code, result.stdout) == (2, "")


def test_a_finished_run_answers_at_once_under_resume(invoke: Invoke, stage: FakeStage) -> None:
    first = invoke("export", "demo/export", "--json")
    again = invoke("export", "demo/export", "--json", "--resume")
    assert only_json(again) == only_json(first)
    assert len(stage.recipes) == 1


def test_a_used_run_folder_is_refused_before_anything_runs(invoke: Invoke, stage: FakeStage) -> None:
    invoke("export", "demo/export")
    before = Path("runs/demo/export/status.json").read_text()
    result = invoke("export", "demo/export")
    assert result.exit_code == 2
    assert "--resume" in result.stderr
    assert "--run-dir" in result.stderr
    assert len(stage.recipes) == 1
    assert Path("runs/demo/export/status.json").read_text() == before


def test_only_rank_0_prints(invoke: Invoke, stage: FakeStage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    result = invoke("train-clip", "demo/nothing")
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", "")


# ---------------------------------------------------------------------------------------------------- dry run


def test_dry_run_prints_origins_and_figures_and_makes_nothing(invoke: Invoke) -> None:
    result = invoke("train-clip", "demo/train-clip", "--dry-run", "--set", "train.seed=5")
    assert result.exit_code == 0
    assert re.search(r"^seed = 5 +# --set$", result.stdout, re.MULTILINE)
    assert "# shipped demo/train-clip.toml" in result.stdout
    assert "# steps = " in result.stdout
    assert not list(Path.cwd().iterdir())
    table = tomllib.loads(result.stdout)  # it can be saved and used as a recipe
    assert table["train"]["seed"] == 5


def test_dry_run_derives_its_figures(invoke: Invoke) -> None:
    arguments = ["pretrain-mim", "EVA02-CLIP-B-16", "--teacher", "t", "--data", "d", "--samples-seen", "10100"]
    arguments += ["--set", "train.global_batch_size=100", "--set", "engine.processes=4", "--json", "--dry-run"]
    said = only_json(invoke(*arguments))
    assert said["run_dir"] == "runs/pretrain-mim-EVA02-CLIP-B-16"
    assert said["derived"] == {
        "steps": 101,
        "warmup_steps": 10,
        "samples_not_used": 0,
        "world_size": 4,
        "samples_per_rank_and_step": 25,
        "image_size": 224,
        "token_grid": [14, 14],
        "masked_patches_at_most": 80,
    }


def test_dry_run_refuses_a_batch_that_does_not_divide(invoke: Invoke) -> None:
    result = invoke("train-clip", "demo/train-clip", "--dry-run", "--set", "engine.processes=3")
    assert result.exit_code == 2
    assert "nearest that do: 126, 129" in result.stderr


def test_dry_run_refuses_an_unknown_preset(invoke: Invoke) -> None:
    result = invoke("train-clip", "EVA02-CLIP-toyy", "--data", "d", "--dry-run")
    assert result.exit_code == 2
    assert "EVA02-CLIP-toy" in result.stderr


@pytest.mark.parametrize("name", ["data-prepare", "export", "eval"])
def test_dry_run_of_stages_that_do_not_train(invoke: Invoke, name: str) -> None:
    said = only_json(invoke(name, f"demo/{name}", "--dry-run", "--json"))
    assert (said["stage"], said["derived"]) == (name, {})


# ---------------------------------------------------------------------------------------------------- recipe


def test_recipe_list_names_what_ships(invoke: Invoke) -> None:
    assert "demo/train-clip" in invoke("recipe", "list").stdout
    names = [row["name"] for row in only_json(invoke("recipe", "list", "--json"))["recipes"]]
    assert not [name for name in names if name.startswith("base/")]


def test_recipe_show_reads_back_equal(invoke: Invoke) -> None:
    result = invoke("recipe", "show", "demo/distill", "--docs")
    Path("shown.toml").write_text(result.stdout)
    assert load_recipe("shown.toml").recipe == load_recipe("demo/distill").recipe
    assert "# Weight of the contrastive loss on the data itself." in result.stdout


def test_recipe_show_has_an_origin_for_every_value(invoke: Invoke) -> None:
    said = only_json(invoke("recipe", "show", "demo/distill", "--json", "--set", "train.seed=3"))
    assert said["origins"]["train.seed"] == "--set"
    assert said["recipe"]["train"]["seed"] == 3


def test_recipe_check_reports_all_files(invoke: Invoke) -> None:
    Path("good.toml").write_text('extends = "demo/train-clip"')
    Path("bad.toml").write_text('extends = "demo/train-clip"\ntrain.sed = 1')
    Path("worse.toml").write_text("[")
    Path("preset.toml").write_text('extends = "demo/train-clip"\nmodel.preset = "nonsense"')
    assert "good.toml: a good recipe for train-clip" in invoke("recipe", "check", "good.toml").stdout
    result = invoke("recipe", "check", "good.toml", "bad.toml", "worse.toml", "preset.toml")
    assert result.exit_code == 2
    assert "3 of 4 recipes have problems" in result.stderr
    for text in ("bad.toml: train.sed = 1", "worse.toml: not valid TOML", "preset.toml: no model preset"):
        assert text in result.stderr


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), Preempted("stopped", fix="run again with --resume")], ids=["ctrl-c", "sigterm"]
)
def test_a_stopped_demo_can_be_typed_again_as_it_was(invoke: Invoke, stage: FakeStage, error: BaseException) -> None:
    """`evatool demo` alone would be another run: another folder, another seed."""

    def stop(path: Path) -> None:
        raise error

    stage.body = stop
    said = only_json(invoke("demo", "--out", "here", "--seed", "1", "--debug-size", "--json"))
    assert said["error"]["next"].startswith("run the same command again")


def test_recipe_diff_names_keys_values_and_where_they_come_from(invoke: Invoke) -> None:
    result = invoke("recipe", "diff", "eva02-clip-l-14/train-clip", "eva02-clip-l-14/train-clip-faithful", "--json")
    assert result.exit_code == 0
    found = {each["key"]: each for each in json.loads(result.stdout)["differences"]}
    assert found["optim.betas"]["values"] == [[0.9, 0.98], [0.9, 0.999]]
    assert found["optim.betas"]["origins"][1].endswith("base/eva-clip-faithful.toml")
    assert found["optim.virtual_world_size"]["values"] == [None, 128]
    assert "model.preset" not in found


def test_recipe_diff_of_a_recipe_and_itself(invoke: Invoke) -> None:
    result = invoke("recipe", "diff", "demo/train-clip", "demo/train-clip")
    assert "set the same" in result.stdout
