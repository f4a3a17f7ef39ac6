"""Make or reopen a run folder, and close it with what happened.

    resolved.toml  environment.json  status.json  result.json  metrics.jsonl  logs/  checkpoints/

No torch here: the command line reads finished runs without it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evatool.core import logging as logs
from evatool.core.atomic_io import write_json_atomically, write_text_atomically
from evatool.core.errors import ExitCode, UsageError
from evatool.core.secrets import holds_secrets, mask_secrets
from evatool.recipe.schema import Recipe
from evatool.recipe.write import to_toml
from evatool.runs.environment import environment, warn_of_other_versions
from evatool.runs.result import Result, read_result, result_to_json
from evatool.runs.reuse import check_reuse, is_used
from evatool.runs.status import first_failure, read_status, write_status

log = logging.getLogger(__name__)

_STATES = {ExitCode.DONE: "done", ExitCode.PREEMPTED: "preempted", ExitCode.INTERRUPTED: "interrupted"}


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
            write_json_atomically(self.path / "result.json", result_to_json(result) | {"table": result.table})
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
                    self._note(), {"exit_code": int(exit_code), "message": mask_secrets(message), "rank": self.rank}
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
    used = is_used(path)
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
        resolved = to_toml(recipe)
        # The run needs what is in it, so credentials stay in it, for this user's eyes only.
        permissions = 0o600 if holds_secrets(resolved) else None
        write_text_atomically(path / "resolved.toml", resolved, permissions=permissions)
        warn_of_other_versions(path / "environment.json")
        write_json_atomically(path / "environment.json", environment(options.command))
        write_status(path, "running", None, None)
    run_dir.handlers.append(logs.add_file(run_dir.logs, rank))
    options.opened = run_dir
    return run_dir


def run_path(recipe: Recipe, options: RunOptions) -> Path:
    """The run folder by precedence: `--run-dir`, the recipe's `run_dir`, `runs/<name>`."""
    return options.run_dir or recipe.run_dir or Path("runs") / options.name


def check_run_dir(recipe: Recipe, options: RunOptions) -> None:
    """Refuse a used folder without `options.resume`, and a resume whose recipe differs. Changes nothing."""
    path = run_path(recipe, options)
    if is_used(path):
        check_reuse(recipe, path, resume=options.resume, accept_drift=options.accept_drift)


def stored_result(recipe: Recipe, options: RunOptions) -> Result | None:
    """The result of a run that is already done, under `options.resume`; None if there is something left to do.

    Raises: RecipeError if the recipe differs from the finished run's.
    """
    path = run_path(recipe, options)
    if not options.resume or read_status(path).get("state") != "done" or not (path / "result.json").is_file():
        return None
    check_run_dir(recipe, options)
    return read_result(path)
