"""One command, several processes: `evatool train-clip R` starts one process a GPU itself, through torchrun's agent."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from evatool.core import errors
from evatool.core.errors import EvatoolError, ExitCode, RecipeError
from evatool.recipe.schema import EvalRecipe, Recipe, TrainingRecipe
from evatool.runs.lease import TOKEN_VARIABLE, new_token, read_token
from evatool.runs.result import Result, read_result
from evatool.runs.run_dir import RunOptions, check_run_dir, run_path
from evatool.runs.status import first_failure, read_status, write_status

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
    command = [sys.executable, "-m", "evatool.runs.launch", str(count), *argv, *json_flag]
    token = new_token()  # rank 0 takes the folder under it: a status of another token is another run's
    environment = os.environ | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": _SAVE_TIMEOUT_SEC, TOKEN_VARIABLE: token}
    # torchrun would set one thread per process and warn about it
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    # Its own session: a terminal's Ctrl-C would reach the ranks directly and again through the agent.
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    with _forwarded_signals(process):
        printed, _ = process.communicate()
    if process.returncode == 0:
        return read_result(path)
    is_ours = read_token(path) in (None, token)
    raise _failure(path, printed, is_status_new=is_ours and _status_stamp(path) != status_before)


@contextlib.contextmanager
def _forwarded_signals(process: subprocess.Popen[str]) -> Iterator[None]:
    interrupts = 0

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        if interrupts > 1:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            # the agent handles these two; SIGUSR1 and SIGHUP ask for the same thing as SIGTERM
            process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    before = {n: signal.signal(n, forward) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _failure(path: Path, printed: str, is_status_new: bool) -> EvatoolError:
    """What went wrong, in rank 0's words where it could still say it."""
    status = read_status(path) if is_status_new else {}  # an older run's status says nothing about this one
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


def run_agent(count: int, argv: Sequence[str]) -> int:
    """Body of the agent process: torchrun on `evatool argv`, with its own report of failures kept to what matters."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)  # the ranks have said it already
    try:
        run.main(["--standalone", f"--nproc-per-node={count}", "-m", "evatool", *argv])
    except ChildFailedError as error:
        for rank, failure in error.failures.items():
            if failure.exitcode < 0 and -failure.exitcode not in (signal.SIGTERM, signal.SIGINT):  # the agent's own
                log.critical("rank %d was killed by %s", rank, signal.Signals(-failure.exitcode).name)
        return 1
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(run_agent(int(sys.argv[1]), sys.argv[2:]))
