"""Whole stages whose disk is full from some write on (row R6 of docs/faults.md): real small disks, all sizes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import short_runs
from small_disk import need_small_disks, run_on_small_disk

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

PROGRAM = [sys.executable, short_runs.__file__, "1"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, the recipe of a short run that saves every two steps, and that run, uninterrupted."""
    need_small_disks()
    folder = tmp_path_factory.mktemp("full")
    evatool(folder, "data-prepare", *short_runs.DATA_PREPARE, "--run-dir", "data")
    evatool(folder, *command(folder), "--run-dir", "whole")
    return folder


def command(folder: Path) -> list[str]:
    return [*short_runs.write_recipe("train-clip", folder), "--set", "checkpoint.every_steps=2"]


def evatool(folder: Path, *arguments: str) -> None:
    done = subprocess.run(
        [*PROGRAM, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kilobytes", [8, 24, 40, 80, 180, 280, 400])
def test_a_run_on_a_small_disk_ends_with_76_and_goes_on_later(work: Path, kilobytes: int) -> None:
    """From a disk that takes no recipe to one that takes two checkpoints and no third."""
    small, kept = work / "small", work / f"kept{kilobytes}"
    small.mkdir(exist_ok=True)
    done = run_on_small_disk(
        [*PROGRAM, *command(work), "--run-dir", "small/run"],
        small,
        f"{kilobytes}k",
        after=f"cp -r small/run {kept.name}",
        cwd=work,
    )
    assert done.returncode == 76, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "disk is full" in done.stderr
    status = json.loads((kept / "status.json").read_text()) if (kept / "status.json").exists() else None
    if status is not None:
        assert (status["state"], status["exit_code"]) == ("failed", 76)
        assert "disk is full" in status["message"]
    evatool(work, *command(work), "--run-dir", kept.name, "--resume")
    assert short_runs.contents_of(kept) == short_runs.contents_of(work / "whole")
    assert short_runs.records_of(kept) == short_runs.records_of(work / "whole")
    shutil.rmtree(kept)


@pytest.mark.parametrize("kilobytes", [40, 280])
@pytest.mark.parametrize(
    ("num_ranks", "more"),
    [("2", []), ("1", ["--set", 'train.trackers=["tensorboard"]'])],
    ids=["two ranks", "tensorboard"],
)
def test_ranks_and_trackers_on_a_small_disk(work: Path, num_ranks: str, more: list[str], kilobytes: int) -> None:
    """The other rank ends too, and a tracker's file is one of those that a full disk stops."""
    small, kept = work / "small", work / f"kept-{num_ranks}-{kilobytes}"
    small.mkdir(exist_ok=True)
    program = [sys.executable, short_runs.__file__, num_ranks, *command(work), *more]
    done = run_on_small_disk(
        [*program, "--run-dir", "small/run"], small, f"{kilobytes}k", after=f"cp -r small/run {kept.name}", cwd=work
    )
    assert done.returncode == 76, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "disk is full" in done.stderr
    if (kept / "status.json").exists():
        status = json.loads((kept / "status.json").read_text())
        assert (status["state"], status["exit_code"]) == ("failed", 76)
    evatool(work, *command(work), *more, "--run-dir", kept.name, "--resume")
    assert short_runs.records_of(kept)[-1]["step"] == short_runs.records_of(work / "whole")[-1]["step"]
    shutil.rmtree(kept)


def test_a_limit_on_the_size_of_files_ends_with_76(work: Path) -> None:
    """`ulimit -f`, as batch systems set it: no file may have more than 60 KiB."""
    program = " ".join(f"'{part}'" for part in [*PROGRAM, *command(work), "--run-dir", "limited"])
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 60; {program}"],
        cwd=work,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 76, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    status = json.loads((work / "limited" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 76)
    evatool(work, *command(work), "--run-dir", "limited", "--resume")
    assert short_runs.contents_of(work / "limited") == short_runs.contents_of(work / "whole")


def test_a_store_on_a_small_disk(work: Path) -> None:
    """What a teacher says is stored until the disk is full; the same command fills the rest."""
    shutil.copytree(work / "whole", work / "teacher", dirs_exist_ok=True)
    small = work / "small"
    small.mkdir(exist_ok=True)
    recipe = [*short_runs.write_recipe("pretrain-mim", work)[1:], "--set", "teacher.store.views=2"]
    arguments = ["store-features", *recipe, "--set", "teacher.store.path=small/store", "--run-dir", "small/run"]
    done = run_on_small_disk([*PROGRAM, *arguments], small, "32k", after="ls small/store", cwd=work)
    assert done.returncode == 76, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "disk is full" in done.stderr
    evatool(work, *arguments)


@pytest.mark.parametrize("kilobytes", [8, 60, 150])
def test_data_prepare_on_a_small_disk(work: Path, kilobytes: int) -> None:
    small = work / "small"
    small.mkdir(exist_ok=True)
    arguments = ["data-prepare", *short_runs.DATA_PREPARE, "--run-dir", "small/run"]
    done = run_on_small_disk(
        [*PROGRAM, *arguments], small, f"{kilobytes}k", after="cat small/run/status.json || true", cwd=work
    )
    assert done.returncode == 76, done.stderr
    assert "Traceback" not in done.stderr
    assert "disk is full" in done.stderr
    if done.stdout:
        assert json.loads(done.stdout)["exit_code"] == 76


@pytest.mark.parametrize(
    ("arguments", "kilobytes"),
    [
        (["export", "whole", "--to", "open_clip"], 60),
        (["export", "whole", "--to", "torch-export"], 700),
        (["eval", "whole", "--suite", "drawings", "--data", "data/eval", "--set", "eval.use_cache=false"], 40),
    ],
    ids=["open_clip", "torch-export", "eval"],
)
def test_export_and_eval_on_a_small_disk(work: Path, arguments: list[str], kilobytes: int) -> None:
    """Torch says "failed writing file" of a full disk, and no more."""
    small = work / "small"
    small.mkdir(exist_ok=True)
    done = run_on_small_disk(
        [*PROGRAM, *arguments, "--run-dir", "small/run"],
        small,
        f"{kilobytes}k",
        after="cat small/run/status.json",
        cwd=work,
    )
    assert done.returncode == 76, done.stderr
    assert "Traceback" not in done.stderr
    status = json.loads(done.stdout)
    assert (status["state"], status["exit_code"]) == ("failed", 76)
    assert status["message"].startswith("the disk is full")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_reader_that_leaves_does_not_end_a_run(work: Path, processes: int) -> None:
    """`evatool ... 2>&1 | head -2`: the ranks that the command starts have the same terminal."""
    name = f"headless{processes}"
    arguments = [*command(work), "--set", f"engine.processes={processes}", "--set", "model.preset=EVA02-CLIP-debug"]
    program = f'"{sys.executable}" -m evatool {" ".join(arguments)} --run-dir {name}'
    line = f'{program} 2>&1 | head -2; echo "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", line], cwd=work, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "0", done.stdout
    assert json.loads((work / name / "status.json").read_text())["state"] == "done"
    assert "step 8/8" in (work / name / "logs" / "rank_00000.log").read_text()
