"""Two starts of a real stage in one folder, killed and frozen owners (row R25 of docs/faults.md)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from preparing import prepare

from evatool.core.errors import RunFolderTakenError
from evatool.data.tar.manifest import ShardIndex
from evatool.data.tar.writer import Sample, ShardWriter
from evatool.runs import lease as lease_module
from evatool.runs.lease import LEASE, read_token, take_lease
from evatool.runs.status import read_status

TINY = {"kind": "drawings", "max_concepts": 12, "num_unseen": 2}

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `evatool ARGUMENTS... --run-dir tmp_path/run`; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "evatool", *arguments, "--run-dir", str(tmp_path / "run")]
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)
        )
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def training(tmp_path: Path) -> list[str]:
    """Arguments of a run that goes on for minutes and saves every few steps."""
    prepare(tmp_path / "data", TINY)
    sets = ["train.samples_seen=400000", "train.global_batch_size=16", "train.log_every=1", "checkpoint.every_steps=5"]
    sets += [f"data.train={tmp_path / 'data' / 'train'}", "schedule.warmup_samples=16", "engine.processes=1"]
    return ["train-clip", "debug/train-clip", *(word for each in sets for word in ("--set", each))]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def last_step(folder: Path) -> int:
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


def written(folder: Path) -> dict[str, int]:
    """When each file was written, but for logs and the lease."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != LEASE and "logs" not in path.parts]
    return {str(path): path.stat().st_mtime_ns for path in files}


@pytest.mark.slow
def test_a_second_trainer_is_refused_until_the_first_is_killed(
    tmp_path: Path, start: Start, training: list[str]
) -> None:
    run = tmp_path / "run"
    first = start(*training)
    wait_for(lambda: last_step(run) >= 6, first)
    for more in (["--resume"], []):
        second = start(*training, *more)
        out, _ = second.communicate(timeout=60)
        assert second.returncode == 2, out
        assert f"in use by process {first.pid} on " in out
    step = last_step(run)
    wait_for(lambda: last_step(run) > step, first)
    first.kill()
    first.wait()
    third = start(*training, "--resume")
    wait_for(lambda: read_token(run) is not None and last_step(run) > step + 3, third)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()[:-1]]
    assert steps == list(range(1, len(steps) + 1))
    third.send_signal(signal.SIGTERM)
    assert third.wait(timeout=60) == 75
    assert not (run / LEASE).exists()


@pytest.mark.slow
def test_a_frozen_trainer_that_was_taken_over_stops_before_it_writes(
    tmp_path: Path, start: Start, training: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a shared storage: the other machine cannot look the process up, and sees that its counter stands still."""
    run = tmp_path / "run"
    first = start(*training)
    wait_for(lambda: last_step(run) >= 6, first)
    first.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(lease_module, "_own_place", lambda: ("another boot", "pid:[1]"))
    monkeypatch.setattr(lease_module, "STILL_SEC", 1.0)
    time.sleep(0.5)
    other = take_lease(run)
    before = written(run)
    first.send_signal(signal.SIGCONT)
    out, _ = first.communicate(timeout=60)
    assert first.returncode == 2, out
    assert f"the run folder was taken over by process {os.getpid()} on " in out
    after = {path: time for path, time in written(run).items() if ".part-" not in path}
    assert after == {path: time for path, time in before.items() if ".part-" not in path}
    assert read_status(run)["state"] == "running"
    other.check()
    other.release()


@pytest.mark.slow
def test_data_prepare_and_its_resume_at_once_lose_nothing(tmp_path: Path, start: Start) -> None:
    run = tmp_path / "run"
    arguments = ["data-prepare", "demo/data-prepare", "--set", "data.max_concepts=300", "--set", "data.num_unseen=30"]
    first = start(*arguments)
    wait_for(lambda: any(run.glob(".partial*/train/*")), first)
    second = start(*arguments, "--resume")
    out, _ = second.communicate(timeout=60)
    assert second.returncode == 2, out
    assert f"in use by process {first.pid} on " in out
    out, _ = first.communicate(timeout=240)
    assert first.returncode == 0, out
    manifest = json.loads((run / "manifest.json").read_text())
    assert len(ShardIndex(run / "train")) == manifest["train"]["num_samples"]
    assert {path.name for path in (run / "eval").iterdir()} == set(manifest["eval"])
    assert not list(run.glob(".partial*"))


def test_data_prepare_publishes_nothing_into_a_folder_that_was_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, write = tmp_path / "run", ShardWriter.write
    theirs = run / ".partial-theirs" / "train"

    def and_then_taken_over(self: ShardWriter, sample: Sample) -> None:
        write(self, sample)
        if not theirs.exists():
            theirs.mkdir(parents=True)
            record = json.loads((run / LEASE).read_text()) | {"token": "theirs", "host": "another"}
            (run / LEASE).write_text(json.dumps(record))

    monkeypatch.setattr(ShardWriter, "write", and_then_taken_over)
    with pytest.raises(RunFolderTakenError, match=r"taken over by process .* on another"):
        prepare(run, TINY)
    names = {path.name for path in run.iterdir()}
    assert names == {LEASE, "resolved.toml", "environment.json", "status.json", "logs", ".partial-theirs"}
    assert read_status(run)["state"] == "running"
    assert theirs.exists()
    assert read_token(run) == "theirs"
