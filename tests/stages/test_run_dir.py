"""Run folders: used, resumed, finished, failed."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
from pathlib import Path
from types import ModuleType

import pytest

import evatool.stages
from evatool.core.atomic_io import write_text_atomically
from evatool.core.errors import (
    DataError,
    EvatoolError,
    ExitCode,
    NumericalError,
    Preempted,
    RecipeError,
    UsageError,
)
from evatool.recipe.load import Resolved, load_recipe
from evatool.recipe.write import to_toml
from evatool.runs import status as status_module
from evatool.runs.result import Result
from evatool.runs.run_dir import RunDir, RunOptions, open_run_dir, stored_result
from evatool.runs.status import read_status
from evatool.stages import run_stage


@pytest.fixture
def resolved() -> Resolved:
    return load_recipe("demo/train-clip")


@pytest.fixture
def options(tmp_path: Path) -> RunOptions:
    return RunOptions(name="mine", run_dir=tmp_path / "run", command=["evatool", "train-clip", "mine"])


def again(options: RunOptions, resume: bool = True) -> RunOptions:
    return RunOptions(name=options.name, run_dir=options.run_dir, resume=resume)


def changed(*overrides: str) -> Resolved:
    return load_recipe("demo/train-clip", overrides)


def test_the_folder_is_the_options_then_the_recipes_then_the_name(
    resolved: Resolved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_run_dir(resolved.recipe, RunOptions(name="a/b")).path == Path("runs/a/b")
    own = changed("run_dir=there").recipe
    assert open_run_dir(own, RunOptions(name="a/b")).path == Path("there")
    assert open_run_dir(own, RunOptions(name="a/b", run_dir=Path("here"))).path == Path("here")


def test_a_new_folder_describes_the_run(resolved: Resolved, options: RunOptions) -> None:
    run_dir = open_run_dir(resolved.recipe, options)
    assert load_recipe(run_dir.path / "resolved.toml").recipe == resolved.recipe
    environment = json.loads((run_dir.path / "environment.json").read_text())
    assert environment["command"] == ["evatool", "train-clip", "mine"]
    assert environment["world_size"] == 1
    assert environment["packages"]["torch"]
    assert read_status(run_dir.path)["state"] == "running"
    assert not run_dir.resumed
    assert options.opened is run_dir


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_files_of_a_run_are_as_open_as_the_umask_says(
    resolved: Resolved, options: RunOptions, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        run_dir = open_run_dir(resolved.recipe, options)
        open_run_dir(resolved.recipe, again(options), rank=1).fail(ExitCode.FAILED, "gone")
        run_dir.finish(Result("train-clip", run_dir.path, {}, {}, ""))
    finally:
        os.umask(before)
    files = [path for path in run_dir.path.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"status.json", "resolved.toml", "environment.json", "result.json"}
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == {path.name: mode for path in files}


def test_credentials_stay_in_the_recipe_and_nowhere_else(options: RunOptions) -> None:
    url = "https://me:pw1@host/{0..9}.tar?sig=pw2"
    recipe = changed('unset=["data.train"]', f'data.sources=[{{name="s",shards="{url}"}}]').recipe
    options.command = ["evatool", "train-clip", "--set", f"data.train={url}", "--token", "pw3"]
    before = os.umask(0o022)
    try:
        run_dir = open_run_dir(recipe, options)
        logging.getLogger("evatool.test").warning("cannot read %s", url)
        run_dir.fail(ExitCode.FAILED, f"cannot read {url}")
    finally:
        os.umask(before)
    assert load_recipe(run_dir.path / "resolved.toml").recipe == recipe
    for path in run_dir.path.rglob("*"):
        if path.is_file() and path.name != "resolved.toml":
            assert "pw" not in path.read_text(), path
            assert path.stat().st_mode & 0o777 == 0o644
    assert (run_dir.path / "resolved.toml").stat().st_mode & 0o777 == 0o600


def test_records_go_to_the_runs_own_log(resolved: Resolved, options: RunOptions) -> None:
    run_dir = open_run_dir(resolved.recipe, options)
    logging.getLogger("evatool.test").warning("seen")
    run_dir.close()
    logging.getLogger("evatool.test").warning("not seen")
    text = (run_dir.logs / "rank_00000.log").read_text()
    assert "WARNING evatool.test: seen" in text
    assert "not seen" not in text


def test_a_used_folder_is_refused_without_resume(resolved: Resolved, options: RunOptions) -> None:
    open_run_dir(resolved.recipe, options).close()
    with pytest.raises(UsageError, match="already used") as caught:
        open_run_dir(resolved.recipe, again(options, resume=False))
    assert "--resume" in str(caught.value.fix)
    assert "--run-dir" in str(caught.value.fix)
    assert open_run_dir(resolved.recipe, again(options)).resumed


def test_other_ranks_do_not_refuse_the_folder_that_rank_0_made(resolved: Resolved, options: RunOptions) -> None:
    open_run_dir(resolved.recipe, options).close()
    other = open_run_dir(resolved.recipe, again(options, resume=False), rank=1)
    other.close()
    assert (other.logs / "rank_00001.log").is_file()


def test_a_folder_with_other_things_is_no_run(resolved: Resolved, options: RunOptions, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    for resume in (False, True):
        with pytest.raises(UsageError):
            open_run_dir(resolved.recipe, again(options, resume))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_file_is_no_run_folder(resolved: Resolved, options: RunOptions, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        open_run_dir(resolved.recipe, options)


def test_an_empty_or_absent_folder_may_be_resumed(resolved: Resolved, options: RunOptions, tmp_path: Path) -> None:
    assert not open_run_dir(resolved.recipe, again(options)).resumed
    (tmp_path / "empty").mkdir()
    assert not open_run_dir(resolved.recipe, RunOptions(name="x", run_dir=tmp_path / "empty", resume=True)).resumed


def test_a_run_that_failed_before_it_made_anything_may_start_anew(resolved: Resolved, options: RunOptions) -> None:
    """A mistyped data folder must not force another run folder, nor a resume with the mistyped recipe."""
    open_run_dir(resolved.recipe, options).fail(ExitCode.FAILED, "no such folder")
    mended = open_run_dir(changed("data.train=right").recipe, again(options, resume=False))
    assert not mended.resumed
    mended.metrics.write_text("{}\n")
    mended.fail(ExitCode.FAILED, "later")
    with pytest.raises(UsageError, match="its run is failed"):
        open_run_dir(resolved.recipe, again(options, resume=False))


def test_a_resume_whose_recipe_differs_lists_the_keys(resolved: Resolved, options: RunOptions) -> None:
    run_dir = open_run_dir(resolved.recipe, options)
    run_dir.close()
    before = (run_dir.path / "resolved.toml").read_text()
    other = changed("train.seed=5", "optim.eps=1e-3", 'unset=["optim.grad_clip_norm"]').recipe
    with pytest.raises(RecipeError) as caught:
        open_run_dir(other, again(options))
    assert caught.value.problems == [
        "optim.eps: was 1e-06, now 0.001",
        "optim.grad_clip_norm: was 1.0, now absent",
        "train.seed: was 0, now 5",
    ]
    assert (run_dir.path / "resolved.toml").read_text() == before


def test_a_resume_may_change_what_does_not_change_the_result(resolved: Resolved, options: RunOptions) -> None:
    open_run_dir(resolved.recipe, options).close()
    same = changed(
        *("train.log_every=3", "checkpoint.keep=9", "data.num_workers=2", "engine.processes=2", "run_dir=x", "source=y")
    )
    run_dir = open_run_dir(same.recipe, again(options))
    assert load_recipe(run_dir.path / "resolved.toml").recipe == same.recipe


def test_the_status_has_the_last_logged_step(resolved: Resolved, options: RunOptions) -> None:
    run_dir = open_run_dir(resolved.recipe, options)
    run_dir.metrics.write_text('{"step": 10}\n{"step": 20, "train/loss": 1.0}\n{"step": 3')
    run_dir.fail(ExitCode.NUMERICAL_ABORT, "not finite")
    status = read_status(run_dir.path)
    assert (status["state"], status["exit_code"], status["message"], status["step"]) == ("failed", 80, "not finite", 20)


def test_the_status_has_the_saved_step_where_it_is_newer(resolved: Resolved, options: RunOptions) -> None:
    """Ctrl-C saves between two log lines."""
    run_dir = open_run_dir(resolved.recipe, options)
    for name in ("step_00000020", "step_00000032", ".step_00000099.part-x"):
        (run_dir.checkpoints / name).mkdir(parents=True)
    run_dir.metrics.write_text('{"step": 30}\n')
    run_dir.fail(ExitCode.INTERRUPTED, "stopped")
    assert read_status(run_dir.path)["step"] == 32


def test_the_rank_that_failed_first_gives_the_code(resolved: Resolved, options: RunOptions) -> None:
    """torchrun ends the other ranks with SIGTERM: without the note, rank 0 would call it a preemption."""
    zero = open_run_dir(resolved.recipe, options)
    one = open_run_dir(resolved.recipe, again(options), rank=1)
    one.fail(ExitCode.BAD_DATA, "rank 1: too many bad pictures")
    zero.fail(ExitCode.PREEMPTED, "stopped by SIGTERM")
    status = read_status(zero.path)
    assert (status["state"], status["exit_code"]) == ("failed", 78)
    assert "rank 1" in status["message"]
    # the next start forgets the note
    open_run_dir(resolved.recipe, again(options)).fail(ExitCode.PREEMPTED, "stopped by SIGTERM")
    assert read_status(zero.path)["exit_code"] == 75


def test_a_preemption_of_all_ranks_stays_one(resolved: Resolved, options: RunOptions) -> None:
    zero = open_run_dir(resolved.recipe, options)
    open_run_dir(resolved.recipe, again(options), rank=1).fail(ExitCode.PREEMPTED, "stopped")
    zero.fail(ExitCode.PREEMPTED, "stopped")
    assert read_status(zero.path)["state"] == "preempted"


def test_files_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "status.json"
    write_text_atomically(path, "old", permissions=0o644)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text_atomically(path, "new", permissions=0o644)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_does_not_hide_the_failure(
    resolved: Resolved, options: RunOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = open_run_dir(resolved.recipe, options)

    def full(path: Path, value: object, **_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(status_module, "write_json_atomically", full)
    run_dir.fail(ExitCode.FAILED, "the real reason")  # raises nothing
    assert run_dir.handlers == []


# ---------------------------------------------------------------------------------------------------- run_stage


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The stage's module: makes a run folder and a result."""
    module = ModuleType("fake")

    def run(recipe: object, options: RunOptions) -> Result:
        run_dir = open_run_dir(recipe, options)  # type: ignore[arg-type]
        (run_dir.path / "made").write_text("x")
        return Result("train-clip", run_dir.path, {"made": run_dir.path / "made"}, {"n": 1}, "next", [["a"], ["b"]])

    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setattr(evatool.stages, "import_module", lambda name: module)
    return module


def test_a_finished_run_hands_back_its_result(resolved: Resolved, options: RunOptions, fake: ModuleType) -> None:
    result = run_stage(resolved, options)
    assert read_status(result.run_dir)["state"] == "done"
    fake.run = None  # type: ignore[attr-defined]
    assert run_stage(resolved, again(options)) == result
    assert stored_result(resolved.recipe, again(options, resume=False)) is None
    with pytest.raises(RecipeError, match="differs"):
        run_stage(changed("train.seed=9"), again(options))


def test_a_finished_run_whose_result_is_gone_runs_again(
    resolved: Resolved, options: RunOptions, fake: ModuleType
) -> None:
    result = run_stage(resolved, options)
    (result.run_dir / "result.json").unlink()
    assert run_stage(resolved, again(options)) == result


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (DataError("gone"), "failed", 1),
        (NumericalError("nan"), "failed", 80),
        (Preempted("saved"), "preempted", 75),
        (KeyboardInterrupt(), "interrupted", 130),
        (ZeroDivisionError("bug"), "failed", 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_failure_reaches_status_and_log(
    resolved: Resolved, options: RunOptions, fake: ModuleType, error: BaseException, state: str, code: int
) -> None:
    def run(recipe: object, options: RunOptions) -> Result:
        open_run_dir(recipe, options)  # type: ignore[arg-type]
        raise error

    fake.run = run  # type: ignore[attr-defined]
    with pytest.raises(type(error)):
        run_stage(resolved, options)
    assert options.opened is not None
    status = read_status(options.opened.path)
    assert (status["state"], status["exit_code"]) == (state, code)
    assert "Traceback" in (options.opened.logs / "rank_00000.log").read_text()


@pytest.mark.parametrize("filename", [None, "some/file"])
def test_a_full_disk_is_told_in_words_by_every_stage(
    resolved: Resolved, options: RunOptions, fake: ModuleType, filename: str | None
) -> None:
    def run(recipe: object, options: RunOptions) -> Result:
        open_run_dir(recipe, options)  # type: ignore[arg-type]
        raise OSError(errno.ENOSPC, "No space left on device", filename)

    fake.run = run  # type: ignore[attr-defined]
    with pytest.raises(EvatoolError, match="the disk is full") as caught:
        run_stage(resolved, options)
    assert caught.value.where == (filename or str(options.run_dir))
    assert "--resume" in str(caught.value.fix)
    assert read_status(run_path(options))["message"].startswith("the disk is full")


def test_sigterm_outside_the_training_loop_is_a_preemption(
    resolved: Resolved, options: RunOptions, fake: ModuleType
) -> None:
    def run(recipe: object, options: RunOptions) -> Result:
        open_run_dir(recipe, options)  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal did not stop the stage")

    fake.run = run  # type: ignore[attr-defined]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted):
        run_stage(resolved, options)
    assert signal.getsignal(signal.SIGTERM) is before
    assert read_status(run_path(options))["exit_code"] == 75


def test_a_refused_folder_keeps_its_status(resolved: Resolved, options: RunOptions, fake: ModuleType) -> None:
    run_stage(resolved, options)
    with pytest.raises(UsageError):
        run_stage(resolved, again(options, resume=False))
    assert read_status(run_path(options))["state"] == "done"


def run_path(options: RunOptions) -> Path:
    assert options.run_dir is not None
    return options.run_dir


def test_the_recipe_of_a_run_is_what_to_toml_writes(resolved: Resolved, options: RunOptions) -> None:
    run_dir: RunDir = open_run_dir(resolved.recipe, options)
    assert (run_dir.path / "resolved.toml").read_text() == to_toml(resolved.recipe)
