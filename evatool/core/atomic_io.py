"""Files that are written whole or not at all, and kept through a power loss. No torch."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evatool.core.shown_text import json_text


def write_bytes_atomically(
    path: Path, data: bytes, *, permissions: int | None = None, make_parents: bool = False
) -> None:
    """Write a file so that a reader, or a start after a crash, sees the old one or the whole new one.

    The bytes go to a name of this call's own in the same folder, are flushed to the disk and get the final name by a
    rename. The rename itself is on the disk after `sync_folder`.

    Args:
        permissions: of the file; as the umask says when absent.
        make_parents: make the folders that are missing above it.
    Raises: OSError as the file system says; nothing is left behind then.
    """
    if make_parents:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with temporary.open("xb") as file:
            if permissions is not None:
                os.fchmod(file.fileno(), permissions)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text_atomically(path: Path, text: str, *, permissions: int | None = None) -> None:
    """Write a UTF-8 text file at once or not at all, as `write_bytes_atomically` does."""
    write_bytes_atomically(path, text.encode(), permissions=permissions)


def write_json_atomically(path: Path, value: Mapping[str, Any], *, permissions: int | None = None) -> None:
    """Write a JSON file, indented by two, at once or not at all. Raises: ValueError for numbers that are not finite."""
    write_text_atomically(path, json_text(value, indent=2) + "\n", permissions=permissions)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries (new names, renames) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
