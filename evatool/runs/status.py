"""`status.json` of a run folder: what became of the run, in words and as an exit code. No torch."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from evatool.core.atomic_io import write_json_atomically
from evatool.core.disk import disk_trouble
from evatool.core.errors import ExitCode
from evatool.core.secrets import mask_secrets

CAUSES = (ExitCode.USAGE, ExitCode.BAD_DATA, ExitCode.UNHEALTHY_NODE, ExitCode.NUMERICAL_ABORT)
"""Exit codes of failures that are a cause, and not what other ranks meet because of one."""


KILLED_ADVICE = "run the same command with --resume; SIGKILL often comes from the system when memory runs out"
_MAX_MESSAGE = 900  # characters: with its escapes still within the 4 kB of one block


def write_status(path: Path, state: str, exit_code: int | None, message: str | None) -> None:
    """Write `status.json`: state, exit code, reason, the last step that was logged or saved, and the time.

    Raises: OSError where even the status that is there cannot be written over.
    """
    status = {
        "state": state,
        "exit_code": None if exit_code is None else int(exit_code),
        "message": None if message is None else mask_secrets(message),
        "step": last_step(path),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    file = path / "status.json"
    try:
        write_json_atomically(file, status)
    except OSError as error:
        if disk_trouble(error) is None:
            raise
        _write_in_place(file, status, error)


def _write_in_place(file: Path, status: dict[str, Any], why: OSError) -> None:
    """Put a status over the one that is there: a file's own blocks can be written where no new ones can be had.

    A reader at that very moment may find a half of it. The message is cut so that the file does not grow by a block.
    """
    if status["message"] is not None:
        status = status | {"message": status["message"][:_MAX_MESSAGE]}
    data = (json.dumps(status, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise why from None
    try:
        written = 0
        while written < len(data):
            written += os.pwrite(descriptor, data[written:], written)
        os.ftruncate(descriptor, len(data))  # only now: what is shorter gives room away
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def first_failure(path: Path) -> dict[str, Any] | None:
    """The note (exit_code, message, rank) of the failure that came first in this start; None if none was noted.

    What has a cause of its own goes before a rank that a signal killed, and that before what others met because of it.
    """
    notes = sorted(path.glob("logs/rank_*.failed.json"), key=lambda note: note.stat().st_mtime_ns)
    found = [_read_table(note) for note in notes]
    stopped = (ExitCode.PREEMPTED, ExitCode.INTERRUPTED)  # ranks that were told to stop are not the cause
    found = [note for note in found if note.get("exit_code", stopped[0]) not in stopped]
    return min(found, key=_rank_of_cause, default=None)


def _rank_of_cause(note: dict[str, Any]) -> int:
    return 0 if note["exit_code"] in CAUSES else 1 if "signal" in note else 2


def read_status(path: Path) -> dict[str, Any]:
    """What `status.json` says; empty if there is none, or none that can be read."""
    status = _read_table(path / "status.json")
    return status if isinstance(status.get("state"), str) else {}


def is_status_damaged(path: Path) -> bool:
    """True where there is a `status.json` that says nothing."""
    return (path / "status.json").exists() and not read_status(path)


def _read_table(file: Path) -> dict[str, Any]:
    """The object in a JSON file that this module writes; empty where the file is missing or damaged."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return {}
    if not isinstance(table, dict):
        return {}
    code, message = table.get("exit_code"), table.get("message")
    is_sound = (code is None or code in list(ExitCode)) and isinstance(message, str | None)
    return table if is_sound else {}


def last_step(path: Path) -> int | None:
    """The newest step that metrics.jsonl or a checkpoint tells of: a run told to stop saves between two log lines."""
    saved = [int(name) for p in path.glob("checkpoints/step_*") if (name := p.name.removeprefix("step_")).isdigit()]
    logged = _last_logged_step(path / "metrics.jsonl")
    return max([*saved, *([] if logged is None else [logged])], default=None)


def _last_logged_step(metrics: Path) -> int | None:
    """Step of the last complete line of metrics.jsonl."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - 65536))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue  # a line cut off by a crash
    return None
