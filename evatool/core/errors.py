"""What can go wrong in a way that a user can mend. `cli/console.py` alone turns these into text and exit codes."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Process exit codes; rank 0 also writes them to `status.json`, since torchrun turns every failure into 1."""

    DONE = 0
    FAILED = 1
    USAGE = 2  # command line or recipe
    PREEMPTED = 75  # stopped by a signal, state saved: run again with --resume
    TRANSIENT = 76  # retry with backoff
    BAD_DATA = 78  # data beyond the limit set in the recipe
    UNHEALTHY_NODE = 79
    NUMERICAL_ABORT = 80
    INTERRUPTED = 130  # Ctrl-C


class EvatoolError(Exception):
    """A failure that the user can mend.

    Args:
        what: what is wrong, with the value seen.
        where: file and key, shard and sample key, or rank and step.
        expected: what would be right.
        fix: the next command or edit.
    """

    exit_code = ExitCode.FAILED
    is_shown = False  # True where another process of this command has already put it on the terminal

    def __init__(
        self, what: str, *, where: str | None = None, expected: str | None = None, fix: str | None = None
    ) -> None:
        super().__init__(what)
        self.what, self.where, self.expected, self.fix = what, where, expected, fix

    def __str__(self) -> str:
        parts = [self.what]
        parts += [f"{label}: {text}" for label, text in self.details()]
        return "\n".join(parts)

    def indented(self) -> str:
        """The message for a log: its lines after the first are indented, as `core.shown_text` asks."""
        return str(self).replace("\n  ", "\n").replace("\n", "\n  ")

    def details(self) -> list[tuple[str, str]]:
        """The labelled parts after the first line, in the order they are shown."""
        named = [("where", self.where), ("expected", self.expected), ("next", self.fix)]
        return [(label, text) for label, text in named if text]


class UsageError(EvatoolError):
    """The command line cannot be carried out as written."""

    exit_code = ExitCode.USAGE


class RunFolderTakenError(UsageError):
    """Another start owns the run folder: this one does not begin, or stops before it writes into it."""


class RecipeError(EvatoolError):
    """The recipe is wrong. `problems` holds one line per problem: all known ones at once."""

    exit_code = ExitCode.USAGE

    def __init__(
        self,
        what: str,
        *,
        problems: list[str] | None = None,
        where: str | None = None,
        expected: str | None = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(what, where=where, expected=expected, fix=fix)
        self.problems = problems or []

    def __str__(self) -> str:
        problems = [f"  {line}" for line in self.problems]
        return "\n".join([self.what, *problems, *(f"{label}: {text}" for label, text in self.details())])


class DataError(EvatoolError):
    """A data folder, shard, caption file or picture cannot be used."""


class BadDataLimitError(DataError):
    """More bad samples than the recipe's `max_bad_fraction` allows."""

    exit_code = ExitCode.BAD_DATA


class CheckpointError(EvatoolError):
    """A checkpoint, run folder or model file is missing, damaged or of another model."""


class DependencyError(EvatoolError):
    """An optional package is missing; `fix` holds its install line."""


class TransientError(EvatoolError):
    """Something outside of the run failed and may work again: start the same command with --resume after a while."""

    exit_code = ExitCode.TRANSIENT


class UnhealthyNodeError(EvatoolError):
    """A machine computes something else than the others: leave it out and go on with --resume."""

    exit_code = ExitCode.UNHEALTHY_NODE


class NumericalError(EvatoolError):
    """Training met values that are not finite beyond its budget."""

    exit_code = ExitCode.NUMERICAL_ABORT


class Preempted(EvatoolError):
    """A signal asked the run to stop; the state was saved and `--resume` goes on from it."""

    exit_code = ExitCode.PREEMPTED


class Interrupted(EvatoolError):
    """Ctrl-C; the state was saved where the stage has one, and `--resume` goes on from it."""

    exit_code = ExitCode.INTERRUPTED
