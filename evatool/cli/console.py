"""The only place that words errors and prints: results to stdout, everything else to stderr, exit codes."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any

import typer

from evatool.cli.streams import send_nowhere
from evatool.core import logging as logs
from evatool.core import stop_signals
from evatool.core.disk import disk_trouble
from evatool.core.errors import EvatoolError, ExitCode, RecipeError, UsageError
from evatool.core.secrets import mask_secrets, mask_values
from evatool.core.shown_text import json_text, shown, shown_lines, shown_page
from evatool.distributed.launcher_env import read_environment


@dataclass
class Report:
    """What a command has to say: `data` under `--json`; else the text, the table and the lines, in this order."""

    data: dict[str, Any]
    text: str = ""
    table: list[list[str]] = field(default_factory=list)
    """Header row first."""
    lines: list[str] = field(default_factory=list)
    is_kept: bool = False
    """True if a run folder holds the same, so that nothing is lost where it cannot be printed."""
    failure: CommandFailure | None = None
    """Why the command fails although it has this to say: printed after the report, and decides the exit code."""


@dataclass
class CommandFailure:
    """An exception in words."""

    kind: str
    message: str
    exit_code: ExitCode
    problems: list[str] = field(default_factory=list)
    details: dict[str, str] = field(default_factory=dict)
    """`where`, `expected` and `next`, those that are known."""
    is_shown: bool = False
    """True if another process of this command has already put it on the terminal."""

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        error: dict[str, Any] = {"type": self.kind, "message": self.message, **self.details}
        if self.problems:
            error["problems"] = self.problems
        return {"error": error, "exit_code": int(self.exit_code)}


_has_answered = False  # whether a command ran and left its object, or its failure, on stdout

GO_ON = "run the same command with --resume to go on"


def execute(action: Callable[[], Report], *, json_output: bool, debug: bool, go_on: str = GO_ON) -> None:
    """Run a command's action, print its report or its failure, and leave with the right exit code.

    Only rank 0 prints. While the action runs, whatever writes to stdout reaches stderr.

    Args:
        go_on: what to do after Ctrl-C or a full disk.
    Raises: typer.Exit.
    """
    global _has_answered
    _has_answered = True
    is_one_of_several = is_cut_off = False
    with contextlib.suppress(UsageError):  # the stage reads it again, and tells
        is_one_of_several = read_environment().world_size > 1
    if is_one_of_several:
        stop_signals.end_if_unheard()
    rank = logs.env_rank()
    failure: CommandFailure | None = None
    report: Report | None = None
    with _stdout_kept_for_results():
        logs.configure(rank=rank, debug=debug)
        try:
            with stop_signals.raising():
                report = action()
            failure = report.failure
        except (KeyboardInterrupt, stop_signals.Terminated, Exception) as error:
            failure, is_cut_off = explain(error, go_on), stop_signals.is_cut_off(error)
            if debug:
                sys.stderr.write(mask_secrets(shown_page(traceback.format_exc())))
    if rank == 0:
        if failure is not None and not failure.is_shown:
            _print_failure(failure)
        try:
            _print_result(report, failure, json_output)
        except BrokenPipeError:  # whoever read the output has seen enough
            send_nowhere(sys.stdout)
        except OSError as error:  # `> file` on a full disk
            unprinted = explain(error, "run the same command again")
            unprinted.details = {"where": "standard output"} | unprinted.details
            _print_failure(unprinted)
            send_nowhere(sys.stdout)  # Python writes what is still buffered at its end: that would fail again
            if report is None or not report.is_kept:
                failure = failure or unprinted  # a script must not take half an object for the whole
    if failure and is_one_of_several and (is_cut_off or failure.exit_code == ExitCode.TRANSIENT):
        stop_signals.leave_at_once(failure.exit_code)
    raise typer.Exit(int(failure.exit_code) if failure else ExitCode.DONE)


def answer_usage_error(arguments: Sequence[str]) -> None:
    """The object that `--json` promises, for a command line that Typer refused, in words on stderr."""
    if "--json" in arguments and not _has_answered and logs.env_rank() == 0:
        failure = CommandFailure("UsageError", "the command line is wrong: stderr says how", ExitCode.USAGE)
        _print_result(None, failure, json_output=True)


def _print_result(report: Report | None, failure: CommandFailure | None, json_output: bool) -> None:
    if json_output:
        data = (report.data if report else {}) | (failure.to_json() if failure else {})
        _write_line(sys.stdout, json_text(mask_values(data)))
    elif report is not None:
        _print_report(report)


def explain(error: BaseException, go_on: str = GO_ON) -> CommandFailure:
    """An exception as what is shown to the user."""
    if isinstance(error, EvatoolError):
        problems = error.problems if isinstance(error, RecipeError) else []
        return CommandFailure(
            type(error).__name__, error.what, error.exit_code, problems, dict(error.details()), error.is_shown
        )
    if isinstance(error, KeyboardInterrupt):
        return CommandFailure("Interrupted", "stopped by Ctrl-C", ExitCode.INTERRUPTED, details={"next": go_on})
    if isinstance(error, stop_signals.Terminated):
        return CommandFailure("Preempted", str(error), ExitCode.PREEMPTED, details={"next": go_on})
    trouble = disk_trouble(error)
    if trouble is not None and isinstance(error, OSError):
        where = {"where": str(error.filename)} if error.filename else {}
        advice = {"next": f"free some space, then {go_on}"}
        return CommandFailure("OSError", trouble, ExitCode.TRANSIENT, details=where | advice)
    if isinstance(error, OSError) and error.filename:
        message = (error.strerror or str(error)).lower()
        return CommandFailure("OSError", message, ExitCode.FAILED, details={"where": str(error.filename)})
    name = type(error).__name__
    first_line = (str(error).strip().splitlines() or ["no message"])[0]
    advice = {"next": "run with --debug for the trace"}
    return CommandFailure(name, f"internal error: {name}: {first_line}", ExitCode.FAILED, details=advice)


def _print_failure(failure: CommandFailure) -> None:
    show = partial(typer.echo, err=True)  # without rich, whose text costs a third of what --dry-run does
    show(typer.style("error: ", fg="red", bold=True) + _safe(failure.message))
    for line in failure.problems:
        show(f"  {_safe(line)}")
    for label, text in failure.details.items():
        show(typer.style(f"{label}: ", bold=True) + _safe(text))


def _safe(message: str) -> str:
    """A message without credentials, and without what could move the cursor or look like another message."""
    return mask_secrets(shown_lines(message))


def _print_report(report: Report) -> None:
    if report.text:
        _write_line(sys.stdout, mask_secrets(shown_page(report.text.rstrip("\n"))))
    if report.table:
        from rich.box import SIMPLE
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        header, *rows = report.table
        table = Table(box=SIMPLE, pad_edge=False, show_header=any(header))
        for name in header:
            table.add_column(Text(shown(name)))
        for row in rows:
            table.add_row(*(Text(mask_secrets(shown(cell))) for cell in row))
        # a pipe has no width: do not fold what a script or a log file will read
        Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200).print(table)
    for line in report.lines:
        _write_line(sys.stdout, _safe(line))


def _write_line(stream: IO[str], line: str) -> None:
    stream.write(line + "\n")
    stream.flush()


@contextlib.contextmanager
def _stdout_kept_for_results() -> Iterator[None]:
    """Send stdout to stderr meanwhile, for C code and child processes as well: DeepSpeed logs to stdout."""
    original = sys.stdout
    original.flush()
    saved: int | None = None
    with contextlib.suppress(OSError, ValueError):  # no file behind it, as under a test runner, or stderr is closed
        if original.fileno() == 1:
            saved = os.dup(1)
            os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if saved is not None:
            os.dup2(saved, 1)
            os.close(saved)
