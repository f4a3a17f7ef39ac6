"""Make or reopen a run folder, and close it with what happened.

    lease.json  resolved.toml  environment.json  status.json  result.json  metrics.jsonl  logs/  checkpoints/

No torch here: the command line reads finished runs without it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evatool.core import logging as logs
from evatool.core.atomic_io import write_json_atomically, write_text_atomically
from evatool.core.disk import can_wait, disk_trouble
from evatool.core.errors import CheckpointError, ExitCode, RunFolderTakenError, UsageError
from evatool.core.secrets import holds_secrets, mask_secrets
from evatool.recipe.schema import Recipe
from evatool.recipe.write import to_toml
from evatool.runs.chain import next_command
from evatool.runs.environment import environment, warn_of_other_versions
from evatool.runs.lease import Lease, check_free, check_token, read_token, take_lease
from evatool.runs.result import RESULT, Result, is_moved, read_result, write_result
from evatool.runs.reuse import check_reuse, is_folder_used, remove_unwritten
from evatool.runs.status import KILLED_ADVICE, first_failure, is_status_damaged, last_step, read_status, write_status

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
    """An open run folder, which rank 0 owns. Ranks above 0 only write their own log."""

    path: Path
    rank: int = 0
    resumed: bool = False
    """True if an earlier start left something to go on from."""
    lease: Lease | None = None
    """Rank 0's."""
    token: str | None = None
    """What rank 0 holds the folder under: whoever speaks for a rank 0 that was killed finds it in the lease."""
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

    def check_owner(self) -> None:
        """Make sure that the folder is still this start's; to be called before anything is written that another start
        would write too.

        Raises: RunFolderTakenError where another start has taken it over.
        """
        if self.lease is not None:
            self.lease.check()
        else:
            check_token(self.path, self.token)

    def refresh_status(self) -> None:
        """Say in status.json how far the running run has come. Raises: as `check_owner`."""
        self.check_owner()
        with can_wait("status.json"):
            write_status(self.path, "running", None, None)

    def finish(self, result: Result) -> None:
        """Write result.json and the final status; the run counts as done from here on. Raises: as `check_owner`."""
        if self.rank == 0:
            self.check_owner()
            write_result(self.path, result)
            self._write_status(ExitCode.DONE, None)
        self.close()

    def fail(self, exit_code: int, message: str, *, speaks_for_rank_0: bool = False) -> None:
        """Write the final status of a run that stopped early.

        When one rank fails, the others die of it a moment later (a closed connection, the launcher's SIGTERM). So
        ranks above 0 leave a note, and rank 0 reports the failure that came first. In a folder that another start has
        taken over nothing is written.

        Args:
            speaks_for_rank_0: rank 0 is gone, so that another rank writes the status in its place.
        """
        try:
            self.check_owner()
            if self.rank > 0:
                note = {"exit_code": int(exit_code), "message": mask_secrets(message), "rank": self.rank}
                write_json_atomically(self._note(self.rank), note)
            if self.rank == 0 or (speaks_for_rank_0 and read_token(self.path) in (None, self.token)):
                first = first_failure(self.path) or {"exit_code": int(exit_code), "message": message}
                self._write_status(first["exit_code"], first["message"])
        except RunFolderTakenError as error:
            log.error("%s: status.json is left to the other start", error.what)
        except OSError as error:  # a full disk must not hide the failure that is being reported
            log.error("status.json could not be written: %s", error)
        self.close()

    def close(self) -> None:
        """Stop writing this run's log file, and give the folder free."""
        for handler in self.handlers:
            logging.getLogger("evatool").removeHandler(handler)
            handler.close()
        self.handlers.clear()
        if self.lease is not None:
            self.lease.release()

    def note_killed(self, rank: int, words: str, signal_name: str) -> None:
        """Leave a note for a rank that a signal ended, which could leave none itself."""
        step = last_step(self.path)
        since = "before the first step" if step is None else f"after step {step}"
        message = f"{words} {since}\nwhere: {self.logs}\nnext: {KILLED_ADVICE}"
        note = {"exit_code": int(ExitCode.TRANSIENT), "message": message, "rank": rank, "signal": signal_name}
        with contextlib.suppress(OSError):  # a full disk: the other ranks' own words remain
            write_json_atomically(self._note(rank), note)

    def _note(self, rank: int) -> Path:
        return self.logs / f"rank_{rank:05d}.failed.json"

    def _write_status(self, exit_code: int, message: str | None) -> None:
        write_status(self.path, _STATES.get(ExitCode(exit_code), "failed"), exit_code, message)


def open_run_dir(recipe: Recipe, options: RunOptions, rank: int = 0) -> RunDir:
    """Make the run folder, or reopen a used one under `options.resume`, and write what describes the run.

    Every rank calls it, rank 0 before the others; rank 0 becomes the folder's owner and writes. A folder whose run
    made nothing before it ended, or was killed, may be used again.
    Raises: RunFolderTakenError if another start is in it, UsageError if it is used, RecipeError if a resumed recipe
        differs.
    """
    path = run_path(recipe, options)
    if rank > 0:
        options.opened = RunDir(path, rank, token=read_token(path))
        options.opened.handlers.append(logs.add_file(options.opened.logs, rank))
        return options.opened
    used = check_run_dir(recipe, options)
    lease = _own(path)
    try:
        run_dir = _begin(recipe, options, lease, used)
    except BaseException:
        if options.opened is None or options.opened.lease is not lease:  # else a failure is still to be written there
            lease.release()
        raise
    return run_dir


def _own(path: Path) -> Lease:
    try:
        path.mkdir(parents=True, exist_ok=True)
        return take_lease(path)
    except OSError as error:
        if disk_trouble(error) is not None:
            raise
        raise UsageError(
            f"the run folder cannot be made or written: {error.strerror}",
            where=str(path),
            fix="choose another with --run-dir",
        ) from error


def _begin(recipe: Recipe, options: RunOptions, lease: Lease, used: bool) -> RunDir:
    """Write what describes the run into the folder that is owned now; it is looked at again, since it may have been
    another's until a moment ago."""
    path = lease.path.parent
    used = used or is_folder_used(path)
    notes = _check_used(recipe, path, options) if used else []
    if is_status_damaged(path):
        notes.append("status.json is damaged and written anew")
    remove_unwritten(path)
    for failed in path.glob("logs/rank_*.failed.json"):
        failed.unlink()
    resolved = to_toml(recipe)
    # The run needs what is in it, so credentials stay in it, for this user's eyes only.
    permissions = 0o600 if holds_secrets(resolved) else None
    write_text_atomically(path / "resolved.toml", resolved, permissions=permissions)
    warn_of_other_versions(path / "environment.json")
    write_json_atomically(path / "environment.json", environment(options.command))
    run_dir = options.opened = RunDir(path, resumed=used, lease=lease, token=lease.token)
    write_status(path, "running", None, None)
    run_dir.handlers.append(logs.add_file(run_dir.logs))
    if options.resume and not used:
        log.info("nothing to resume in %s: the run starts from the beginning", path)
    for note in notes:
        log.warning("%s", note)
    return run_dir


def run_path(recipe: Recipe, options: RunOptions) -> Path:
    """The run folder by precedence: `--run-dir`, the recipe's `run_dir`, `runs/<name>`."""
    return options.run_dir or recipe.run_dir or Path("runs") / options.name


def check_run_dir(recipe: Recipe, options: RunOptions) -> bool:
    """Refuse a folder that another process of this machine owns, a used one without `options.resume`, and a resume
    whose recipe differs. Changes nothing; True if the folder is used."""
    path = run_path(recipe, options)
    check_free(path)
    used = is_folder_used(path)
    if used:
        _check_used(recipe, path, options)
    return used


def stored_result(recipe: Recipe, options: RunOptions) -> Result | None:
    """The result of a run that is already done, under `options.resume`; None if there is something left to do.

    Raises: RecipeError if the recipe differs from the finished run's.
    """
    path = run_path(recipe, options)
    if not options.resume or read_status(path).get("state") != "done" or not (path / RESULT).is_file():
        return None
    _check_used(recipe, path, options)
    try:
        result = read_result(path)
    except CheckpointError as error:
        log.warning("%s: it is made anew", error.what)
        return None
    if is_moved(path):
        result.next_command = next_command(recipe, options.name, path) or result.next_command
        with contextlib.suppress(OSError):  # of a run that is only read here
            write_result(path, result)
    return result


def _check_used(recipe: Recipe, path: Path, options: RunOptions) -> list[str]:
    return check_reuse(recipe, path, resume=options.resume, accept_drift=options.accept_drift)
