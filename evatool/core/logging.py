"""Logging, configured once by the command line: rank 0 to stderr, every rank to its own file in the run folder."""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

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


class _ConsoleHandler(logging.Handler):
    """Records on the shared console, imported with the first of them: `--help` and `--dry-run` have none."""

    _STYLES = ((logging.ERROR, "bold red"), (logging.WARNING, "yellow"), (logging.INFO, "blue"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            from rich.text import Text

            style = next((style for level, style in self._STYLES if record.levelno >= level), "dim")
            line = Text.assemble((f"{record.levelname.lower():8}", style), self.format(record))
            stderr_console().print(line, soft_wrap=True, highlight=False)
        except Exception:
            self.handleError(record)


def configure(rank: int = 0, debug: bool = False) -> None:
    """Send the package's records to stderr on rank 0; other ranks keep errors only."""
    root = logging.getLogger("evatool")
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    root.propagate = False
    for handler in list(root.handlers):
        root.removeHandler(handler)
    handler = _ConsoleHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s" if debug else "%(message)s"))
    handler.setLevel(logging.DEBUG if debug else logging.INFO if rank == 0 else logging.ERROR)
    root.addHandler(handler)


def add_file(folder: Path, rank: int = 0) -> logging.Handler:
    """Also write this rank's records to `folder/rank_00000.log`; returns the handler so that a stage can drop it."""
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"rank_{rank:05d}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.setLevel(logging.DEBUG)
    logging.getLogger("evatool").addHandler(handler)
    return handler
