"""What a save does to the disk, recorded, and what power loss may leave of it.

The model: a file's data are on the disk once the file was flushed, and before that any part of them may be, or zeros of
the same length; a folder's entries are once the folder was flushed, and before that any number of the first changes to
it may be. Folders and files do not wait for each other.
"""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

Operation = tuple[Any, ...]


class RecordingFile:
    """A new or opened file whose writes are noted."""

    def __init__(self, file: Any, path: Path, log: list[Operation]) -> None:
        self._file, self._path, self._log = file, path, log

    def write(self, data: Any) -> int:
        self._log.append(("write", self._path, self._file.tell(), bytes(data)))
        return self._file.write(data)

    def truncate(self, size: int) -> int:
        self._log.append(("truncate", self._path, size))
        return self._file.truncate(size)

    def __enter__(self) -> RecordingFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def record(monkeypatch: pytest.MonkeyPatch) -> list[Operation]:
    """From here on every change to the disk is appended to the list."""
    log: list[Operation] = []
    real_open, real_mkdir, real_unlink, real_touch = Path.open, Path.mkdir, Path.unlink, Path.touch
    real_fsync, real_replace, real_rmtree = os.fsync, os.replace, shutil.rmtree

    def path_open(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = real_open(path, mode, *args, **kwargs)
        if "x" in mode:
            log.append(("create", path))
        return RecordingFile(file, path, log) if set(mode) & set("xwa+") else file

    def touch(path: Path, *args: Any, **kwargs: Any) -> None:
        if not path.exists():
            log.append(("create", path))
        real_touch(path, *args, **kwargs)

    def mkdir(path: Path, *args: Any, **kwargs: Any) -> None:
        if not path.exists():
            log.append(("mkdir", path))
        real_mkdir(path, *args, **kwargs)

    def unlink(path: Path, *args: Any, **kwargs: Any) -> None:
        log.append(("remove", path))
        real_unlink(path, *args, **kwargs)

    def replace(source: Any, target: Any) -> None:
        real_replace(source, target)
        log.append(("rename", Path(source), Path(target)))

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        log.append(("flush", Path(f"/proc/self/fd/{descriptor}").readlink()))

    def rmtree(path: Any, *args: Any, **kwargs: Any) -> None:
        log.extend(("remove", file) for file in sorted(Path(path).iterdir()))
        log.append(("remove", Path(path)))
        real_rmtree(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", path_open)
    monkeypatch.setattr(Path, "touch", touch)
    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(Path, "unlink", unlink)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    return log


@dataclass
class Node:
    """A file or a folder: what is on the disk for sure, what a reader sees now, and what was not flushed yet."""

    is_folder: bool
    flushed: Any  # entries of a folder (name -> node), bytes of a file
    now: Any
    pending: list[Any] = field(default_factory=list)

    @classmethod
    def empty(cls, is_folder: bool) -> Node:
        return cls(is_folder, {} if is_folder else b"", {} if is_folder else b"")

    @classmethod
    def of(cls, path: Path) -> Node:
        """Something that is wholly on the disk."""
        if path.is_dir():
            entries = {child.name: cls.of(child) for child in path.iterdir()}
            return cls(True, dict(entries), dict(entries))
        return cls(False, path.read_bytes(), path.read_bytes())

    def change(self, change: Any) -> None:
        self.now = applied(self.now, change)
        self.pending.append(change)

    def flush(self) -> None:
        self.flushed, self.pending = self.now, []

    def after_power_loss(self, path: Path, pick: random.Random, survival: str) -> None:
        """Write what is left to `path`: of what was not flushed "all", "nothing", "zeros" for data, or "some"."""
        value = self.flushed
        kept = {"all": len(self.pending), "nothing": 0, "zeros": len(self.pending)}
        if self.is_folder:
            for change in self.pending[: kept.get(survival, pick.randint(0, len(self.pending)))]:
                value = applied(value, change)
            path.mkdir()
            for name, node in value.items():
                node.after_power_loss(path / name, pick, survival)
            return
        for start, data in self.pending[: kept[survival] if survival == "nothing" else None]:
            if survival == "some" and pick.random() < 0.5:
                continue
            is_zeroed = survival == "zeros" or (survival == "some" and pick.random() < 0.3)
            value = applied(value, (start, bytes(len(data)) if is_zeroed else data))
        path.write_bytes(value)


def applied(value: Any, change: Any) -> Any:
    """A folder's entries or a file's bytes after one change."""
    if isinstance(value, bytes):
        start, data = change
        return value[:start].ljust(start, b"\0") + data + value[start + len(data) :]
    what, name, other = change
    entries = dict(value)
    if what == "add":
        entries[name] = other
    elif name in entries:
        node = entries.pop(name)
        if what == "rename":
            entries[other] = node
    return entries


def replay(root: Path, before: Node, log: list[Operation]) -> Node:
    """`root`, which was `before`, after these operations."""

    def find(path: Path) -> Node:
        node = before
        for part in path.relative_to(root).parts:
            node = node.now[part]
        return node

    for what, path, *rest in log:
        parent = find(path.parent) if path != root else before
        if what in ("create", "mkdir"):
            parent.change(("add", path.name, Node.empty(what == "mkdir")))
        elif what == "remove":
            parent.change(("remove", path.name, None))
        elif what == "rename":
            assert rest[0].parent == path.parent
            parent.change(("rename", path.name, rest[0].name))
        elif what == "flush":
            find(path).flush()
        elif what == "truncate":
            assert not find(path).now, "a new file"
            find(path).change((0, bytes(rest[0])))
        else:
            find(path).change((rest[0], rest[1]))
    return before
