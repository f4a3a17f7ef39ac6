"""Make or reopen a run folder, and keep its `status.json` true to what happened.

    resolved.toml  environment.json  status.json  result.json  metrics.jsonl  logs/  checkpoints/

No torch here: the command line reads finished runs without it.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import evatool
from evatool.core import logging as logs
from evatool.core.atomic_io import write_json_atomically, write_text_atomically
from evatool.core.errors import CheckpointError, ExitCode, RecipeError, UsageError
from evatool.recipe.load import load_recipe
from evatool.recipe.schema import Recipe
from evatool.recipe.write import flatten, format_value, to_table, to_toml
from evatool.runs.result import Result, read_result, result_to_json

log = logging.getLogger(__name__)

# Keys that do not change what is computed: a resumed run may differ in them.
RESUMABLE_KEYS = (
    *("run_dir", "source", "train.log_every", "train.micro_batch_size", "data.num_workers"),
    "teacher.store.path",
    *(f"eval.{key}" for key in ("num_threads", "processes", "shard_model", "use_cache", "cache_dir", "fetch")),
)
RESUMABLE_TABLES = ("engine.", "checkpoint.", "evaluate.", "images.", "validation.", "train.guard.", "train.trackers")

# What a run leaves behind before it has made anything.
_BOOKKEEPING = {"resolved.toml", "environment.json", "status.json", "logs", "parameter_groups.tsv"}
_STATES = {ExitCode.DONE: "done", ExitCode.PREEMPTED: "preempted", ExitCode.INTERRUPTED: "interrupted"}
_PACKAGES = (
    *("torch", "torchvision", "timm", "open_clip_torch", "webdataset", "deepspeed", "clip-benchmark"),
    *("numpy", "pillow", "safetensors", "pydantic", "typer", "rich"),
)


@dataclass
class RunOptions:
    """What the command line says about a run besides its recipe."""

    name: str
    """Name of the default run folder below `runs/`."""
    run_dir: Path | None = None
    """Run folder; the recipe's, else `runs/<name>` when absent."""
    resume: bool = False
    """Go on in a used run folder."""
    debug: bool = False
    """Show traces and debug records."""
    command: Sequence[str] = ()
    """The command line, for environment.json."""
    accept_drift: tuple[str, ...] = ()
    """Keys of the recipe, or tables of keys, in which a resumed run may differ from how it was started."""
    opened: RunDir | None = None
    """Set by `open_run_dir`, so that a failure is written into this run's folder and into no other."""


@dataclass
class RunDir:
    """An open run folder. Ranks above 0 only write their own log."""

    path: Path
    rank: int = 0
    resumed: bool = False
    """True if an earlier start left something to go on from."""
    handlers: list[logging.Handler] = field(default_factory=list, repr=False)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def journal(self) -> Path:
        """One line of JSON for each step that was skipped and each rollback."""
        return self.path / "journal.jsonl"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def refresh_status(self) -> None:
        """Say in status.json how far the running run has come."""
        write_status(self.path, "running", None, None)

    def finish(self, result: Result) -> None:
        """Write result.json and the final status; the run counts as done from here on."""
        if self.rank == 0:
            write_json_atomically(
                self.path / "result.json", result_to_json(result) | {"table": result.table}, permissions=0o644
            )
            self._write_status(ExitCode.DONE, None)
        self.close()

    def fail(self, exit_code: int, message: str) -> None:
        """Write the final status of a run that stopped early.

        When one rank fails, the others die of it a moment later (a closed connection, the launcher's SIGTERM). So
        ranks above 0 leave a note, and rank 0 reports the failure that came first.
        """
        try:
            if self.rank > 0:
                write_json_atomically(
                    self._note(),
                    {"exit_code": int(exit_code), "message": message, "rank": self.rank},
                    permissions=0o644,
                )
            else:
                first = first_failure(self.path) or {"exit_code": int(exit_code), "message": message}
                self._write_status(first["exit_code"], first["message"])
        except OSError as error:  # a full disk must not hide the failure that is being reported
            log.error("status.json could not be written: %s", error)
        self.close()

    def close(self) -> None:
        """Stop writing this run's log file."""
        for handler in self.handlers:
            logging.getLogger("evatool").removeHandler(handler)
            handler.close()
        self.handlers.clear()

    def _note(self) -> Path:
        return self.logs / f"rank_{self.rank:05d}.failed.json"

    def _write_status(self, exit_code: int, message: str | None) -> None:
        write_status(self.path, _STATES.get(ExitCode(exit_code), "failed"), exit_code, message)


def open_run_dir(recipe: Recipe, options: RunOptions, rank: int = 0) -> RunDir:
    """Make the run folder, or reopen a used one under `options.resume`, and write what describes the run.

    Every rank calls it; rank 0 writes. A folder whose run failed before it made anything may be used again.
    Raises: UsageError if the folder is used, RecipeError if a resumed recipe differs.
    """
    path = run_path(recipe, options)
    used = _is_used(path)
    if rank == 0:
        check_run_dir(recipe, options)
        if options.resume and not used:
            log.info("nothing to resume in %s: the run starts from the beginning", path)
    run_dir = RunDir(path, rank=rank, resumed=used)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"the run folder cannot be made: {error.strerror}", where=str(path), fix="choose another with --run-dir"
        ) from error
    if rank == 0:
        for note in path.glob("logs/rank_*.failed.json"):
            note.unlink()
        write_text_atomically(path / "resolved.toml", to_toml(recipe), permissions=0o644)
        _warn_of_other_versions(path / "environment.json")
        write_json_atomically(path / "environment.json", environment(options.command), permissions=0o644)
        write_status(path, "running", None, None)
    run_dir.handlers.append(logs.add_file(run_dir.logs, rank))
    options.opened = run_dir
    return run_dir


def _warn_of_other_versions(before: Path) -> None:
    """Say so where a resumed run started with another Python or other packages: its numbers may differ a little."""
    try:
        old = json.loads(before.read_text(encoding="utf-8"))
        packages = old["packages"] | {"python": old["python"]}
    except (OSError, ValueError, KeyError, TypeError):
        return  # a new run, or one that was killed before it could write this
    now = {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()}
    changed = [name for name in now if packages.get(name, now[name]) != now[name]]
    differing = [f"{name} {packages[name]}, now {now[name]}" for name in changed]
    if differing:
        log.warning("this run was started with other versions: %s", "; ".join(differing))


def run_path(recipe: Recipe, options: RunOptions) -> Path:
    """The run folder by precedence: `--run-dir`, the recipe's `run_dir`, `runs/<name>`."""
    return options.run_dir or recipe.run_dir or Path("runs") / options.name


def check_run_dir(recipe: Recipe, options: RunOptions) -> None:
    """Refuse a used folder without `options.resume`, and a resume whose recipe differs. Changes nothing."""
    path = run_path(recipe, options)
    if _is_used(path):
        _check_reuse(recipe, path, options)


def stored_result(recipe: Recipe, options: RunOptions) -> Result | None:
    """The result of a run that is already done, under `options.resume`; None if there is something left to do.

    Raises: RecipeError if the recipe differs from the finished run's.
    """
    path = run_path(recipe, options)
    if not options.resume or read_status(path).get("state") != "done" or not (path / "result.json").is_file():
        return None
    check_run_dir(recipe, options)
    return read_result(path)


# ---------------------------------------------------------------------------------------------------- used folders


def _is_used(path: Path) -> bool:
    """True if the folder holds anything that a new run must not mix with."""
    if not path.exists():
        return False
    if not path.is_dir():
        raise UsageError("the run folder is a file", where=str(path), fix="choose another with --run-dir")
    names = {entry.name for entry in path.iterdir()}
    made_nothing = names <= _BOOKKEEPING and read_status(path).get("state") in ("failed", "interrupted", "preempted")
    return bool(names) and not made_nothing


def _check_reuse(recipe: Recipe, path: Path, options: RunOptions) -> None:
    if not options.resume:
        state = read_status(path).get("state")
        raise UsageError(
            "the run folder is already used" + (f" (its run is {state})" if state else ""),
            where=str(path),
            fix="go on with --resume, or choose another folder with --run-dir",
        )
    if not (path / "resolved.toml").is_file():
        raise UsageError(
            "there is no run to resume: the folder holds other things and no resolved.toml",
            where=str(path),
            fix="choose another folder with --run-dir",
        )
    differences = _differences(load_recipe(path / "resolved.toml").recipe, recipe)
    problems = []
    for key, line in differences.items():
        if any(key == accepted or key.startswith(f"{accepted}.") for accepted in options.accept_drift):
            log.warning("the recipe differs from the run's, as accepted: %s", line)
        else:
            problems.append(line)
    if problems:
        raise RecipeError(
            "the recipe differs from the run's that is to be resumed",
            problems=problems,
            where=str(path / "resolved.toml"),
            fix="resume with the recipe as it was, start a new run with --run-dir, or accept a key's new value with "
            "--accept-drift KEY",
        )


def _differences(before: Recipe, now: Recipe) -> dict[str, str]:
    """One line per differing key that a resume may not change unasked."""
    old, new = flatten(to_table(before)), flatten(to_table(now))
    keys = [k for k in dict.fromkeys((*old, *new)) if k not in RESUMABLE_KEYS and not k.startswith(RESUMABLE_TABLES)]

    def show(table: dict[str, Any], key: str) -> str:
        return format_value(table[key]) if key in table else "absent"

    return {key: f"{key}: was {show(old, key)}, now {show(new, key)}" for key in keys if old.get(key) != new.get(key)}


# ---------------------------------------------------------------------------------------------------- files


def write_status(path: Path, state: str, exit_code: int | None, message: str | None) -> None:
    """Write `status.json`: state, exit code, reason, the last step that was logged or saved, and the time."""
    status = {
        "state": state,
        "exit_code": None if exit_code is None else int(exit_code),
        "message": message,
        "step": _last_step(path),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_json_atomically(path / "status.json", status, permissions=0o644)


def first_failure(path: Path) -> dict[str, Any] | None:
    """The note (exit_code, message, rank) of the rank above 0 that failed first in this start; None if none did."""
    notes = sorted(path.glob("logs/rank_*.failed.json"), key=lambda note: note.stat().st_mtime_ns)
    found = [json.loads(note.read_text(encoding="utf-8")) for note in notes]
    stopped = (ExitCode.PREEMPTED, ExitCode.INTERRUPTED)  # ranks that were told to stop are not the cause
    return next((note for note in found if note["exit_code"] not in stopped), None)


def read_status(path: Path) -> dict[str, Any]:
    """What `status.json` says; empty if there is none. Raises: CheckpointError if it is damaged."""
    file = path / "status.json"
    try:
        status = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except NotADirectoryError:
        return {}
    except ValueError as error:
        raise CheckpointError("status.json is damaged", where=str(file), fix="choose another --run-dir") from error
    return status if isinstance(status, dict) else {}


def environment(command: Sequence[str]) -> dict[str, Any]:
    """Versions, git commit, world size and command line of this process."""
    return {
        "command": list(command),
        "evatool": evatool.__version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "packages": {name: _version(name) for name in _PACKAGES},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Commit of the source tree evatool runs from, `+dirty` with uncommitted changes; None for an installed wheel."""
    root = Path(evatool.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+dirty" if changes.stdout.strip() else "")


def _last_step(path: Path) -> int | None:
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
