"""Results alone on stdout, and exceptions in words."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from evatool.cli.console import explain
from evatool.core.errors import CheckpointError, ExitCode

NOISY = """
import os, sys
from evatool.cli.console import Report, execute

def action():
    print("from python")
    os.write(1, b"from C\\n")
    os.system("echo from a child")
    return Report(data={"done": True}, table=[["name"], ["[red]x[/red]"]], lines=["next: y"])

execute(action, json_output="--json" in sys.argv, debug=False)
"""
# typer.Exit is an exception here: there is no Typer app around it.


def run_noisy(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", NOISY, *arguments], capture_output=True, text=True)


def test_nothing_but_the_object_reaches_stdout() -> None:
    """C code and child processes write to the file descriptor, past sys.stdout."""
    result = run_noisy("--json")
    assert json.loads(result.stdout) == {"done": True}
    assert result.stdout.count("\n") == 1
    for text in ("from python", "from C", "from a child"):
        assert text in result.stderr


def test_nothing_but_the_table_and_lines_reaches_stdout() -> None:
    result = run_noisy()
    assert "from" not in result.stdout
    assert [line.strip() for line in result.stdout.splitlines() if line.strip(" ─")] == [
        "name",
        "[red]x[/red]",
        "next: y",
    ]


HOSTILE = """
import sys
from evatool.cli.console import Report, execute
from evatool.core.errors import RecipeError

NAME = "a\\x1b[31m\\nerror: forged\\x9b\\u202e\\udcff[red]x[/red]"
URL = "https://user:pw1@host/a.tar?sig=pw2"

def action():
    if "fail" in sys.argv:
        problems = [f"{NAME}: {URL}", "data.token = \\"pw3\\": unknown key"]
        raise RecipeError(f"bad {NAME}", problems=problems, where="first\\n  " + NAME, fix=NAME)
    text = "x = 1\\ny = 2 # \\x1b[31m"
    return Report(data={NAME: NAME, "token": "pw4"}, text=text, table=[[NAME], [NAME]], lines=[NAME, URL])

execute(action, json_output="--json" in sys.argv, debug=False)
"""


@pytest.mark.parametrize("arguments", [[], ["--json"], ["fail"]], ids=["report", "json", "failure"])
def test_nothing_from_outside_acts_on_the_terminal(arguments: list[str]) -> None:
    ran = subprocess.run([sys.executable, "-c", HOSTILE, *arguments], capture_output=True, text=True)
    said = ran.stdout + ran.stderr.partition("Traceback")[0]  # of typer.Exit, see above
    lines = said.split("\n")
    assert all(line.isprintable() for line in lines)
    assert "[red]x[/red]" in said
    assert sum(line.startswith("error:") for line in lines) == (arguments == ["fail"])
    assert "forged" in said
    assert "pw" not in said
    if arguments == ["--json"]:
        name = "a\x1b[31m\nerror: forged\x9b\u202e\udcff[red]x[/red]"
        assert json.loads(ran.stdout)[name] == name
    if arguments == ["fail"]:
        assert [line for line in lines if line.startswith("  a\\x1b")]  # the second line of `where`


def test_a_full_disk_says_so() -> None:
    failure = explain(OSError(errno.ENOSPC, "No space left on device", "runs/x/0.tar"), go_on="go on")
    assert (failure.message, failure.exit_code) == ("the disk is full", ExitCode.TRANSIENT)
    assert failure.details == {"where": "runs/x/0.tar", "next": "free some space, then go on"}


@pytest.mark.parametrize("error", [ValueError(), ValueError("one\ntwo"), OSError("no file behind it")], ids=repr)
def test_a_bug_is_one_line_with_the_way_to_its_trace(error: Exception) -> None:
    failure = explain(error)
    assert failure.message.startswith(f"internal error: {type(error).__name__}: ")
    assert "\n" not in failure.message
    assert "--debug" in failure.details["next"]


def test_json_leaves_out_what_is_not_known() -> None:
    assert explain(CheckpointError("gone")).to_json() == {
        "error": {"type": "CheckpointError", "message": "gone"},
        "exit_code": 1,
    }


def run_cli(redirection: str, *, script: str = "recipe list --json") -> subprocess.CompletedProcess[str]:
    command = f'exec "{sys.executable}" -m evatool {script} {redirection}'
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_fails_in_words() -> None:
    result = run_cli("> /dev/full")
    assert result.returncode == 76
    assert result.stderr.splitlines()[:2] == ["error: the disk is full", "where: standard output"]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-"], ids=["stdout", "stderr", "both"])
def test_a_closed_stream_is_no_failure(redirection: str) -> None:
    result = run_cli(redirection)
    assert (result.returncode, result.stderr) == (0, "")
    assert bool(result.stdout) == (redirection == "2>&-")


STEADY = """
import logging, os, subprocess, sys, time
from evatool.cli.console import Report, execute
from evatool.cli.streams import keep_streams

keep_streams()

def action():
    for number in range(200):
        logging.getLogger("evatool").info("line %d", number)
        print("from python")
        os.system("echo from a child >&2")
        time.sleep(0.001)
    print("all done", file=open(sys.argv[1], "w"))
    return Report(data={"done": True}, table=[["name"], ["x"]], lines=["next: y"] * 5, is_kept=True)

try:
    execute(action, json_output="--json" in sys.argv, debug=False)
except BaseException as stop:
    print(getattr(stop, "exit_code", stop), file=open(sys.argv[1], "a"))
"""


@pytest.mark.parametrize(
    "redirection", ["2>&1 | head -1", "2>/dev/null | true", ">/dev/full 2>/dev/full", ">&- 2>&-", "--json | true"]
)
def test_a_run_outlives_whoever_reads_it(redirection: str, tmp_path: Path) -> None:
    """`| head`, a full disk behind both streams, and none at all: the action ends, with its own exit code."""
    (tmp_path / "program.py").write_text(STEADY)
    line = f'"{sys.executable}" program.py said {redirection}'
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (tmp_path / "said").read_text() == "all done\n0\n", done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [["eval", "--json"], ["train-clip", "x.toml", "--json", "--no-such-flag"]])
def test_a_refused_command_line_still_answers_in_json(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "evatool", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert json.loads(done.stdout)["exit_code"] == 2
    assert done.stderr
