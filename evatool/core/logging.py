"""Logging, configured once by the command line: rank 0 to stderr, every rank to its own file in the run folder.

Records hold names and messages from outside: `ShownFormatter` makes them safe to show and hides credentials in them.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import sys
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from evatool.core.errors import EvatoolError
from evatool.core.secrets import mask_secrets
from evatool.core.shown_text import shown, shown_lines, shown_page

if TYPE_CHECKING:
    from rich.console import Console


def env_rank() -> int:
    """This process's rank as torchrun sets it in the environment; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


@cache
def stderr_console() -> Console:
    """The one console for logs, bars and messages: shared, so that a log line does not tear a live bar."""
    from rich.console import Console

    return Console(stderr=True)


class ShownFormatter(logging.Formatter):
    """Formats a record so that nothing in it moves a terminal's cursor, forges a further record or tells a credential.

    Values in a message are on one line; lines after a record's first are indented, those of a trace too.
    """

    def format(self, record: logging.LogRecord) -> str:
        record = copy.copy(record)  # the other handlers format it for themselves
        if isinstance(record.args, tuple):
            record.args = tuple(map(_shown_value, record.args))
        return mask_secrets(shown_lines(super().format(record)))

    def formatException(
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None],
    ) -> str:
        return "  " + shown_page(super().formatException(ei)).replace("\n", "\n  ")


def _shown_value(value: Any) -> Any:
    if isinstance(value, EvatoolError):
        return shown_lines(value.indented())
    return shown(str(value)) if isinstance(value, str | Path | BaseException) else value


class _ConsoleHandler(logging.Handler):
    """Records on the shared console, imported with the first of them: `--help` and `--dry-run` have none."""

    _STYLES = ((logging.ERROR, "bold red"), (logging.WARNING, "yellow"), (logging.INFO, "blue"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            from rich.text import Text

            style = next((style for level, style in self._STYLES if record.levelno >= level), "dim")
            line = Text.assemble((f"{record.levelname.lower():8}", style), self.format(record))
            stderr_console().print(line, soft_wrap=True, highlight=False)
        except OSError:
            pass  # a terminal that is gone, or a full disk behind stderr: the run's own log has the record
        except Exception:
            self.handleError(record)


class _FileHandler(logging.FileHandler):
    """A log file that a full disk does not turn into a trace for every record: it is said once, until it works again.

    What the file did not take stays in its buffer, and is written first once there is room.
    """

    _has_failed = _failed_now = False

    def emit(self, record: logging.LogRecord) -> None:
        self._failed_now = False
        super().emit(record)
        self._has_failed = self._failed_now

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self._failed_now = True
        if not self._has_failed:
            # Not through this logger, whose handler this is.
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(f"the log {self.baseFilename} cannot be written: {error.strerror}\n")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # said before
            super().close()


def configure(rank: int = 0, debug: bool = False) -> None:
    """Send the package's records to stderr on rank 0; other ranks keep errors only."""
    root = logging.getLogger("evatool")
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    root.propagate = False
    for handler in list(root.handlers):
        root.removeHandler(handler)
    handler = _ConsoleHandler()
    handler.setFormatter(ShownFormatter("%(name)s: %(message)s" if debug else "%(message)s"))
    handler.setLevel(logging.DEBUG if debug else logging.INFO if rank == 0 else logging.ERROR)
    root.addHandler(handler)


def add_file(folder: Path, rank: int = 0) -> logging.Handler:
    """Also write this rank's records to `folder/rank_00000.log`; returns the handler so that a stage can drop it."""
    folder.mkdir(parents=True, exist_ok=True)
    handler = _FileHandler(folder / f"rank_{rank:05d}.log", encoding="utf-8")
    handler.setFormatter(ShownFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.setLevel(logging.DEBUG)
    logging.getLogger("evatool").addHandler(handler)
    return handler
