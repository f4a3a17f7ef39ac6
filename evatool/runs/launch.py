"""One command, several processes: `evatool train-clip R` starts one process a GPU itself, through torchrun's agent."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from evatool.core import errors
from evatool.core.errors import EvatoolError, ExitCode, Interrupted, Preempted, RecipeError, TransientError
from evatool.core.own_process import PARENT_VARIABLE
from evatool.recipe.schema import EvalRecipe, Recipe, TrainingRecipe
from evatool.runs.lease import TOKEN_VARIABLE, new_token, read_token
from evatool.runs.result import Result, read_result
from evatool.runs.run_dir import RunOptions, check_run_dir, run_path
from evatool.runs.status import CAUSES, KILLED_ADVICE, first_failure, last_step, read_status, write_status

log = logging.getLogger(__name__)

# Seconds that ranks get to save after SIGTERM or Ctrl-C; torchrun's own 30 would kill them while a large model is
# still being written. A rank that failed is not waited for this long.
_SAVE_TIMEOUT_SEC = "600"


def num_processes(recipe: Recipe) -> int:
    """Processes to start: 1 outside the stages that use several ranks, under torchrun, and on one device."""
    if not isinstance(recipe, TrainingRecipe | EvalRecipe) or "RANK" in os.environ:
        return 1
    asked = recipe.eval.processes if isinstance(recipe, EvalRecipe) else recipe.engine.processes
    if asked is not None:
        return asked
    import torch

    return max(1, torch.cuda.device_count())


def launch_if_needed(recipe: Recipe, options: RunOptions, argv: Sequence[str]) -> Result | None:
    """Run the command again in several processes and hand back rank 0's result; None if one process is enough.

    Ctrl-C and SIGTERM reach every rank once, through the agent; a second Ctrl-C kills them without saving.

    Args:
        argv: the command line after `evatool`.
    Raises: EvatoolError with the failed run's words and exit code.
    """
    if not isinstance(recipe, TrainingRecipe | EvalRecipe) or "RANK" in os.environ:
        return None
    check_run_dir(recipe, options)  # before torch is imported and processes start
    count = num_processes(recipe)
    if count == 1:
        return None
    log.info("starting %d processes on this machine", count)
    path = run_path(recipe, options)
    status_before = _status_stamp(path)
    json_flag = [] if "--json" in argv else ["--json"]
    report, report_end = os.pipe()
    command = [sys.executable, "-m", "evatool.runs.agent", str(count), str(report_end), *argv, *json_flag]
    token = new_token()  # rank 0 takes the folder under it: a status of another token is another run's
    environment = os.environ | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": _SAVE_TIMEOUT_SEC, TOKEN_VARIABLE: token}
    environment |= {"PYTHONSAFEPATH": "1", PARENT_VARIABLE: str(os.getpid())}
    # torchrun would set one thread per process and warn about it
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    # Its own session: a terminal's Ctrl-C would reach the ranks directly and again through the agent.
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True, pass_fds=[report_end]
    )
    os.close(report_end)
    with _forwarded_signals(process) as asked, os.fdopen(report, encoding="utf-8") as lines:
        printed, _ = process.communicate()
        killed = _words_for_killed(process.returncode, [json.loads(line) for line in lines])
    if process.returncode == 0:
        return read_result(path)
    is_ours = read_token(path) in (None, token)
    is_status_new = is_ours and _status_stamp(path) != status_before
    if asked.number is not None:
        _record_stop(path, asked, is_status_new)
        raise _stopped(path, asked) if not is_status_new else _failure(path, printed, is_status_new)
    raise _failure(path, printed, is_status_new, killed)


@dataclass
class _Asked:
    """What the launcher was told while its ranks ran."""

    number: int | None = None
    """The first signal."""
    num_interrupts: int = 0

    @property
    def exit_code(self) -> ExitCode:
        return ExitCode.INTERRUPTED if self.number == signal.SIGINT else ExitCode.PREEMPTED

    def __str__(self) -> str:
        if self.num_interrupts > 1:
            return "stopped at once by a second Ctrl-C, without saving"
        return f"stopped by {'Ctrl-C' if self.number == signal.SIGINT else signal.Signals(self.number or 0).name}"


@contextlib.contextmanager
def _forwarded_signals(process: subprocess.Popen[str]) -> Iterator[_Asked]:
    asked = _Asked()

    def forward(number: int, frame: FrameType | None) -> None:
        asked.number = asked.number or number
        asked.num_interrupts += number == signal.SIGINT
        if asked.num_interrupts > 1:
            os.killpg(process.pid, signal.SIGKILL)  # its ranks end with it
        else:
            # the agent handles these two; SIGUSR1 and SIGHUP ask for the same thing as SIGTERM
            process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    before = {n: signal.signal(n, forward) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _words_for_killed(returncode: int, killed: Sequence[dict[str, Any]]) -> str | None:
    """Which processes ended by a signal; None if none did."""
    host = platform.node()
    if returncode < 0:
        return f"torchrun's agent on {host}, which starts the ranks, was killed by {signal.Signals(-returncode).name}"
    if not killed:
        return None
    return "; ".join(f"rank {each['rank']} on {host} was killed by {each['signal']}" for each in killed)


def _record_stop(path: Path, asked: _Asked, is_status_new: bool) -> None:
    """The final status of a run whose rank 0 was asked to stop, and ended before it could write one."""
    if is_status_new and read_status(path).get("state") == "running":
        state = "interrupted" if asked.exit_code == ExitCode.INTERRUPTED else "preempted"
        write_status(path, state, asked.exit_code, str(asked))


def _stopped(path: Path, asked: _Asked) -> EvatoolError:
    """The end of a run that was asked to stop while its ranks were still starting."""
    kind = Interrupted if asked.exit_code == ExitCode.INTERRUPTED else Preempted
    return kind(f"{asked}: nothing was made yet", where=str(path), fix="run the same command again")


def _failure(path: Path, printed: str, is_status_new: bool, killed: str | None = None) -> EvatoolError:
    """What went wrong, in rank 0's words where it could still say it.

    Args:
        killed: the processes that a signal ended: the failure, unless a rank had a reason of its own before.
    """
    status = read_status(path) if is_status_new else {}  # an older run's status says nothing about this one
    if killed is not None and status.get("state") != "done" and status.get("exit_code") not in CAUSES:
        first = first_failure(path) if is_status_new else None
        if first is None or first["exit_code"] not in CAUSES:
            return _killed(path, killed, is_status_new)
    if status.get("state") == "running":  # rank 0 was killed before it could write: by its memory, or by torchrun
        silent: dict[str, Any] = {"exit_code": ExitCode.FAILED, "message": "a process died without a message"}
        first = first_failure(path) or silent
        write_status(path, "failed", first["exit_code"], first["message"])
        status = read_status(path)
    said = _error_object(printed)
    # The status goes first: rank 0 may have died of another rank's failure, and only the status knows of it.
    exit_code = ExitCode(status.get("exit_code") or said.get("exit_code") or ExitCode.FAILED)
    error = said.get("error", {})
    if said.get("exit_code") != exit_code:
        error = {"message": status.get("message") or "a process failed", "where": str(path / "logs")}
    failure = _rebuilt(error)
    failure.exit_code = exit_code
    failure.is_shown = said.get("exit_code") == exit_code  # by rank 0
    return failure


def _killed(path: Path, killed: str, is_status_new: bool) -> TransientError:
    step = last_step(path) if is_status_new else None
    failure = TransientError(
        f"{killed} {'before the first step' if step is None else f'after step {step}'}",
        where=str(path / "logs"),
        fix=KILLED_ADVICE,
    )
    if is_status_new:
        write_status(path, "failed", failure.exit_code, str(failure))
    return failure


def _rebuilt(error: dict[str, Any]) -> EvatoolError:
    """The exception behind the object that `--json` printed."""
    parts = {"where": error.get("where"), "expected": error.get("expected"), "fix": error.get("next")}
    kind = getattr(errors, str(error.get("type")), EvatoolError)
    if kind is RecipeError:
        return RecipeError(error["message"], problems=error.get("problems"), **parts)
    return (
        kind(error["message"], **parts) if issubclass(kind, EvatoolError) else EvatoolError(error["message"], **parts)
    )


def _status_stamp(path: Path) -> int | None:
    """Changes whenever status.json is written; None if there is none."""
    try:
        return (path / "status.json").stat().st_mtime_ns
    except OSError:
        return None


def _error_object(printed: str) -> dict[str, Any]:
    try:
        found = json.loads(printed)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and "error" in found else {}
