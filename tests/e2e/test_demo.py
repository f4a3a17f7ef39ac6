"""`evatool demo` at debug size: interrupted once, run again, and what it leaves."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evatool.stages.demo import CHAIN

pytestmark = pytest.mark.e2e

COMMAND = [sys.executable, "-m", "evatool", "demo", "--debug-size", "--json", "--out"]
DEADLINE_SEC = 400


def state_of(out: Path, step: str) -> str:
    path = out / step / "status.json"
    return json.loads(path.read_text())["state"] if path.exists() else "absent"


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The demo stopped by Ctrl-C while its second stage trains, then run again to the end."""
    out = tmp_path_factory.mktemp("demo") / "with space"
    first = subprocess.Popen([*COMMAND, str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    give_up = time.monotonic() + DEADLINE_SEC
    while state_of(out, "train-clip") == "absent" and first.poll() is None and time.monotonic() < give_up:
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    stdout, stderr = first.communicate(timeout=DEADLINE_SEC)
    prepared = (out / "data-prepare" / "train" / "manifest.json").stat().st_mtime_ns
    second = subprocess.run([*COMMAND, str(out)], capture_output=True, text=True, timeout=DEADLINE_SEC)
    return {
        "out": out,
        "first": (first.returncode, stdout, stderr),
        "second": (second.returncode, second.stdout, second.stderr),
        "prepared": prepared,
    }


def test_ctrl_c_exits_130_and_says_how_to_go_on(interrupted: dict) -> None:
    code, stdout, stderr = interrupted["first"]
    assert code == 130, stderr
    assert json.loads(stdout)["exit_code"] == 130
    assert "run" in stderr
    assert "again" in stderr


def test_the_second_run_finishes_the_chain(interrupted: dict) -> None:
    code, stdout, stderr = interrupted["second"]
    assert code == 0, stderr
    summary = json.loads(stdout)
    assert summary["stage"] == "demo"
    assert all(Path(path).exists() for path in summary["outputs"].values())
    assert {state_of(interrupted["out"], step.name) for step in CHAIN} == {"done"}


def test_finished_stages_are_not_repeated(interrupted: dict) -> None:
    manifest = interrupted["out"] / "data-prepare" / "train" / "manifest.json"
    assert manifest.stat().st_mtime_ns == interrupted["prepared"]
    assert "data-prepare is already done" in " ".join(interrupted["second"][2].split())


def test_the_report_needs_no_other_file(interrupted: dict) -> None:
    page = (interrupted["out"] / "report.html").read_text(encoding="utf-8")
    loads = re.findall(r"(?:src|href)\s*=\s*[\"']([^\"']+)|url\(([^)]+)\)|@import\s+(\S+)", page)
    loaded = [found for groups in loads for found in groups if found]
    assert loaded, "a report without pictures"
    assert [found for found in loaded if not found.startswith(("data:", "#"))] == []


def test_the_report_compares_every_model_on_every_set(interrupted: dict) -> None:
    page = (interrupted["out"] / "report.html").read_text(encoding="utf-8")
    results = json.loads((interrupted["out"] / "eval" / "results.json").read_text())
    models = [step.model for step in CHAIN if step.model]
    assert [model["name"] for model in results["models"]] == models
    assert len(results["sets"]) == 7
    assert {(row["model"], row["set"]) for row in results["results"]} == {
        (model, record["name"]) for model in models for record in results["sets"]
    }
    assert all(name in page for name in [*models, *(record["title"] for record in results["sets"])])
