"""Run folders that were killed early, damaged, moved or finished (rows R24 to R26 of docs/faults.md)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from evatool.core.errors import CheckpointError, ExitCode, RecipeError, RunFolderTakenError, UsageError
from evatool.recipe.load import load_recipe
from evatool.recipe.schema import Recipe
from evatool.recipe.write import to_toml
from evatool.runs import environment
from evatool.runs.lease import LEASE, _start_time
from evatool.runs.result import Result, read_result
from evatool.runs.run_dir import RunDir, RunOptions, check_run_dir, open_run_dir, stored_result
from evatool.runs.status import read_status, write_status
from evatool.stages.demo import Clock
from evatool.train.hooks.log import read_metrics

NAME = "debug/train-clip"
KILLED_STARTS = Path(__file__).parents[1] / "helpers" / "killed_starts.py"


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(NAME).recipe


@pytest.fixture(autouse=True)
def no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes less a start."""
    monkeypatch.setattr(environment, "_git_commit", lambda: None)


def options(folder: Path, *accepted: str, resume: bool = True) -> RunOptions:
    return RunOptions(NAME, folder, resume, accept_drift=accepted)


@pytest.fixture
def used(tmp_path: Path, recipe: Recipe) -> Path:
    """The folder of a run that has saved a checkpoint and was stopped."""
    run_dir = open_run_dir(recipe, options(tmp_path / "run"))
    for step in (4, 12):
        (run_dir.checkpoints / f"step_{step:08d}").mkdir(parents=True)
        (run_dir.checkpoints / f"step_{step:08d}" / "resolved.toml").write_text(to_toml(recipe))
    run_dir.fail(ExitCode.PREEMPTED, "stopped")
    return run_dir.path


@pytest.fixture
def finished(tmp_path: Path, recipe: Recipe) -> RunDir:
    """The folder of a run that is done."""
    run_dir = open_run_dir(recipe, options(tmp_path / "here" / "run"))
    run_dir.checkpoints.mkdir()
    outputs = {"checkpoint": run_dir.checkpoints / "step_00000004", "teacher": Path("/elsewhere/run/teacher")}
    run_dir.finish(Result("train-clip", run_dir.path, outputs, {"steps": 4}, f"evatool eval {run_dir.path}"))
    return run_dir


# ------------------------------------------------------------------------------------------------------ early kills


@pytest.mark.slow
def test_a_start_killed_at_any_of_its_file_operations_leaves_a_folder_to_start_in(tmp_path: Path) -> None:
    """A plain start and `--resume` begin in what a first start leaves, and in what one leaves that takes over."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    command = [sys.executable, str(KILLED_STARTS), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kills = [json.loads(line) for line in result.stdout.splitlines()]
    assert [kill["start"] for kill in kills].count("first") > 14
    assert [kill["start"] for kill in kills].count("second") > 20
    assert any(".resolved.toml." in " ".join(kill["left"]) for kill in kills)
    for kill in kills:
        assert (kill["plain"], kill["resume"]) == (0, 0), (kill, result.stderr)
        assert kill["plain leaves"] == kill["resume leaves"] == [], kill


@pytest.mark.parametrize("resume", [False, True], ids=["plain", "resume"])
def test_what_a_kill_before_the_recipe_leaves_may_be_used(tmp_path: Path, recipe: Recipe, resume: bool) -> None:
    (tmp_path / ".resolved.toml.0123abcd.partial").write_text("stage = ")
    run_dir = open_run_dir(recipe, options(tmp_path, resume=resume))
    run_dir.close()
    assert not run_dir.resumed
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "environment.json",
        "logs",
        "resolved.toml",
        "status.json",
    ]


def test_a_killed_start_that_made_nothing_needs_no_resume(tmp_path: Path, recipe: Recipe) -> None:
    run_dir = open_run_dir(recipe, options(tmp_path))
    lease = (tmp_path / LEASE).read_text()
    run_dir.close()
    (tmp_path / LEASE).write_text(lease.replace('"start_time": ', '"start_time": 9'))  # as after a kill
    open_run_dir(load_recipe(NAME, ["train.seed=9"]).recipe, options(tmp_path, resume=False)).close()


def test_other_peoples_files_are_left_alone(tmp_path: Path, recipe: Recipe) -> None:
    for name in ("thesis.tex", ".hidden.partial", "logs"):
        folder = tmp_path / name.strip(".")
        folder.mkdir()
        (folder / name).mkdir() if name == "logs" else (folder / name).write_text("precious")
        with pytest.raises(UsageError):
            open_run_dir(recipe, options(folder, resume=False))
        assert [path.name for path in folder.iterdir()] == [name]


# ----------------------------------------------------------------------------------------------------- one at a time


def test_a_folder_in_use_is_refused_with_and_without_resume(used: Path, recipe: Recipe) -> None:
    run_dir = open_run_dir(recipe, options(used))
    other = os.getppid()  # lives, and is another process
    lease = json.loads((used / LEASE).read_text()) | {"pid": other, "start_time": _start_time(other)}
    (used / LEASE).write_text(json.dumps(lease))
    before = {path: path.read_bytes() for path in used.iterdir() if path.is_file()}
    for resume in (True, False):
        for refused in (check_run_dir, open_run_dir):
            with pytest.raises(RunFolderTakenError):
                refused(recipe, options(used, resume=resume))
    assert {path: path.read_bytes() for path in used.iterdir() if path.is_file()} == before
    run_dir.close()
    open_run_dir(recipe, options(used)).close()


def test_who_was_taken_over_writes_neither_status_nor_result(used: Path, recipe: Recipe) -> None:
    run_dir = open_run_dir(recipe, options(used))
    (used / LEASE).write_text((used / LEASE).read_text().replace(run_dir.token or "", "f" * 32))
    write_status(used, "running", None, "the other's")
    with pytest.raises(RunFolderTakenError):
        run_dir.refresh_status()
    with pytest.raises(RunFolderTakenError):
        run_dir.finish(Result("train-clip", used))
    run_dir.fail(ExitCode.FAILED, "mine")
    assert read_status(used)["message"] == "the other's"
    assert not (used / "result.json").exists()
    assert (used / LEASE).exists()


def test_another_rank_of_who_was_taken_over_leaves_no_note_for_the_new_owner(used: Path, recipe: Recipe) -> None:
    zero, one = (open_run_dir(recipe, options(used), rank=rank) for rank in (0, 1))
    (used / LEASE).write_text((used / LEASE).read_text().replace(zero.token or "", "f" * 32))
    one.fail(ExitCode.BAD_DATA, "of another run")
    assert not list(used.glob("logs/*.failed.json"))
    zero.close()


def test_other_ranks_know_what_the_folder_is_held_under(tmp_path: Path, recipe: Recipe) -> None:
    zero = open_run_dir(recipe, options(tmp_path))
    one = open_run_dir(recipe, options(tmp_path), rank=1)
    assert one.token == zero.token
    one.close()
    zero.lease.check() if zero.lease else pytest.fail("rank 0 has no lease")
    zero.close()


# ---------------------------------------------------------------------------------------------------------- damage

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "cut at a table": lambda data: data[: data.rindex(b"[")] if b"\n[" in data else data[:-2],
    "no text": lambda data: b"\xff\xfe\x00" + data,
    "zeros": lambda data: bytes(len(data)),
    "other types": lambda data: data.replace(b'"', b"").replace(b" = ", b" = [5] # ").replace(b": ", b": 5, "),
    "a list": lambda data: b"[]",
    "deep": lambda data: b'{"state":' * 5000,
}


DAMAGED = [("resolved.toml", kind) for kind in DAMAGE]
DAMAGED += [("status.json", kind) for kind in ("empty", "cut", "no text", "other types", "deep")]
DAMAGED += [("environment.json", kind) for kind in ("other types", "deep")]


@pytest.mark.parametrize(("name", "damage"), DAMAGED)
def test_damage_does_not_keep_a_run_from_going_on(
    used: Path, recipe: Recipe, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    (used / name).write_bytes(DAMAGE[damage]((used / name).read_bytes()))
    run_dir = open_run_dir(recipe, options(used))
    run_dir.close()
    assert run_dir.resumed
    assert load_recipe(used / "resolved.toml").recipe == recipe
    assert read_status(used)["state"] == "running"
    assert name == "environment.json" or f"{name} is damaged" in caplog.text


def test_the_recipe_is_then_the_newest_checkpoints(used: Path, recipe: Recipe) -> None:
    newest = used / "checkpoints" / "step_00000012" / "resolved.toml"
    newest.write_text(newest.read_text().replace("seed = 0", "seed = 7"))
    (used / "resolved.toml").write_bytes(b"")
    with pytest.raises(RecipeError) as refused:
        open_run_dir(recipe, options(used))
    assert refused.value.problems == ["train.seed: was 7, now 0"]
    newest.write_bytes(b"\0")  # then that of the one before
    open_run_dir(recipe, options(used)).close()


def test_where_no_recipe_can_be_read_the_given_one_stands(
    used: Path, recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(used / "checkpoints" / "step_00000012")
    for file in (used / "resolved.toml", used / "checkpoints" / "step_00000004" / "resolved.toml"):
        file.unlink()
    (used / "metrics.jsonl").write_text("{}\n")
    open_run_dir(recipe, options(used)).close()
    assert "it goes on with the one that was given" in caplog.text


@pytest.mark.parametrize(
    "text",
    [b"", b"\xff", b"[]", b'{"stage": 1}', b'{"a":' * 5000, b'{"stage": "x", "run_dir": 5}'],
    ids=["empty", "bytes", "list", "short", "deep", "types"],
)
def test_a_damaged_result_is_made_anew(
    finished: RunDir, recipe: Recipe, text: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (finished.path / "result.json").write_bytes(text)
    assert stored_result(recipe, options(finished.path)) is None
    assert "result.json is missing or damaged: it is made anew" in caplog.text
    with pytest.raises(CheckpointError, match="damaged"):
        read_result(finished.path)


def test_a_damaged_line_of_the_metrics_is_left_out(tmp_path: Path) -> None:
    good = [b'{"step": 1, "train/loss": 2.0}', b'{"step": 2}']
    bad = [b"", b'{"step": 9', b"5", b"[]", b"{}", b'{"step": "x"}', b"\xff\xfe", bytes(40), b"[" * 5000]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([good[0], *bad, good[1]]))
    assert read_metrics(tmp_path / "metrics.jsonl") == [json.loads(line) for line in good]


@pytest.mark.parametrize("text", [b"", b"[]", b'{"train-clip": []}', b"\xff"])
def test_damaged_times_of_a_demo_start_anew(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "demo.json").write_bytes(text)
    assert Clock(tmp_path / "demo.json").seconds == {}


def test_what_was_being_written_when_a_start_was_killed_is_removed(used: Path, recipe: Recipe) -> None:
    left = [".status.json.0123abcd.partial", "logs/.rank_00001.failed.json.0123abcd.partial", ".metrics.jsonl.tmp"]
    left += ["predictions/m/.set.npz.0123abcd.partial"]
    for name in left:
        (used / name).parent.mkdir(parents=True, exist_ok=True)
        (used / name).write_text("")
    (used / ".keep.partial").write_text("another's")
    open_run_dir(recipe, options(used)).close()
    assert [name for name in left if (used / name).exists()] == []
    assert (used / ".keep.partial").exists()


# ------------------------------------------------------------------------------------------------ finished and moved


def test_a_moved_run_answers_with_its_new_paths(finished: RunDir, recipe: Recipe, tmp_path: Path) -> None:
    before = finished.path
    after = (tmp_path / "there" / "my run").absolute()
    after.parent.mkdir()
    shutil.move(before, after)
    result = stored_result(recipe, options(after))
    assert result is not None
    assert result.run_dir == after
    assert result.outputs == {
        "checkpoint": after / "checkpoints" / "step_00000004",
        "teacher": Path("/elsewhere/run/teacher"),
    }
    assert f"'{after}'" in (result.next_command or "")
    assert str(before) not in (after / "result.json").read_text()
    assert read_result(after) == result


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (
            "python -c \"open_clip.create_model('local-dir:{old}')\"",
            "python -c \"open_clip.create_model('local-dir:{new}')\"",
        ),
        ("evatool eval {old}/x {old}2", "evatool eval {new}/x {old}2"),
        (None, None),
    ],
)
def test_a_moved_export_is_loaded_from_its_new_place(tmp_path: Path, command: str | None, expected: str | None) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    run_dir = RunDir(old)
    old.mkdir()
    run_dir.finish(Result("export", old, {}, {}, command and command.format(old=old, new=new)))
    old.rename(new)
    assert read_result(new).next_command == (expected and expected.format(old=old, new=new))
    new.rename(tmp_path / "a b")  # how that is quoted depends on the command
    assert read_result(tmp_path / "a b").next_command is None or command is None


@pytest.mark.parametrize("accepted", [(), ("train.samples_seen",), ("train",)], ids=["unasked", "key", "table"])
def test_a_finished_run_is_not_extended_and_never_answers_for_a_longer_one(
    finished: RunDir, accepted: tuple[str, ...]
) -> None:
    longer = load_recipe(NAME, ["train.samples_seen=4096"]).recipe
    for refused in (stored_result, check_run_dir, open_run_dir):
        with pytest.raises(RecipeError, match="has ended and is not extended") as caught:
            refused(longer, options(finished.path, *accepted))
        assert any(line.startswith("train.samples_seen: was ") for line in caught.value.problems)
        assert "--run-dir" in str(caught.value.fix)
        assert f"model.init.path={finished.path}" in str(caught.value.fix)
        assert caught.value.exit_code == ExitCode.USAGE


def test_a_finished_run_does_not_answer_for_another_recipe(finished: RunDir) -> None:
    with pytest.raises(RecipeError, match="differs from that of the finished run"):
        stored_result(load_recipe(NAME, ["train.seed=5"]).recipe, options(finished.path, "train.seed"))


def test_a_run_that_is_not_finished_may_be_made_longer(used: Path) -> None:
    longer = load_recipe(NAME, ["train.samples_seen=4096"]).recipe
    open_run_dir(longer, options(used, "train.samples_seen")).close()
