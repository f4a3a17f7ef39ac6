"""Exported files appear whole and verified, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evatool.core.atomic_io import sync_folder
from evatool.core.disk import disk_error
from evatool.core.errors import UsageError

_PARTIAL = ".export-"


@dataclass(frozen=True)
class Target:
    """Where an export goes, and how much it may differ.

    Attributes:
        tolerance: largest relative L2 difference between our outputs and the reloaded export's.
        replace: write over the files of an earlier, unfinished export.
        check_owner: called before the files appear in the folder; raises where another run has it.
    """

    folder: Path
    tolerance: float
    replace: bool = False
    check_owner: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Exported:
    """The files that were written, and how well they agree with the model."""

    folder: Path
    files: tuple[str, ...]
    difference: float  # largest relative L2 difference of the reloaded model
    agreement: Mapping[str, Any] = field(default_factory=dict)  # of files in fewer bits with the model


@contextmanager
def staged_folder(target: Target, files: Sequence[str], *, optional: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary folder inside the target's; on leaving without an exception, `files` move out of it, in order.

    The last of `files` is the one that makes the folder a model for its readers. If anything fails, nothing that was
    written remains, and a target folder that this call created is removed.

    Args:
        optional: files that move as well, before the others, if they were written.

    Raises: UsageError if one of `files` is already there; TransientError on a full disk.
    """
    out = target.folder
    present = [name for name in files if (out / name).exists()]
    if present and not target.replace:
        raise UsageError(
            f"the folder already holds an export: {', '.join(present)}",
            where=str(out),
            fix="choose another folder with --out, or remove these files",
        )
    created = not out.exists()
    moved: list[Path] = []
    work: Path | None = None
    try:
        out.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        work = out / f"{_PARTIAL}{uuid.uuid4().hex[:8]}"
        work.mkdir()
        yield work
        target.check_owner()
        for name in [*(n for n in optional if (work / n).exists()), *files]:
            os.replace(work / name, out / name)
            moved.append(out / name)
        sync_folder(out)
    except BaseException as error:
        # Looked at before anything is removed: what is written part by part may only say that it failed.
        in_words = disk_error(error, out, "run the same command again, or choose another disk with --out")
        for path in moved:
            path.unlink(missing_ok=True)
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
        if created:
            shutil.rmtree(out, ignore_errors=True)
        if isinstance(error, OSError):
            target.check_owner()  # whoever took the folder over has removed `work`: that is the cause then
        if in_words is not None:
            raise in_words from error
        raise
    _remove_leftovers(out)


def write_text(path: Path, text: str) -> None:
    """Write a new text file and flush it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write a new JSON file and flush it to the disk."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sync_file(path: Path) -> None:
    """Flush a file that another library has written to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _remove_leftovers(out: Path) -> None:
    for path in out.glob(f"{_PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)
