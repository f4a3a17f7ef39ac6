"""Files are whole or absent, flushed before they get their name, and nothing is left behind."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from evatool.core.atomic_io import sync_folder, write_bytes_atomically, write_json_atomically, write_text_atomically


def test_the_old_file_stays_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_bytes_atomically(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError("no room")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no room"):
        write_bytes_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_the_bytes_are_on_the_disk_before_they_have_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (happened.append("flush"), fsync(descriptor))[1])
    monkeypatch.setattr(os, "replace", lambda old, new: (happened.append("rename"), replace(old, new))[1])
    write_text_atomically(tmp_path / "a", "é")
    sync_folder(tmp_path)
    assert happened == ["flush", "rename", "flush"]
    assert (tmp_path / "a").read_text(encoding="utf-8") == "é"


def test_permissions_and_missing_folders(tmp_path: Path) -> None:
    write_json_atomically(tmp_path / "a.json", {"b": 1}, permissions=0o600)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o600
    assert (tmp_path / "a.json").read_text() == '{\n  "b": 1\n}\n'
    with pytest.raises(FileNotFoundError):
        write_bytes_atomically(tmp_path / "new" / "b", b"1")
    write_bytes_atomically(tmp_path / "new" / "b", b"1", make_parents=True)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomically(tmp_path / "c.json", {"b": float("nan")})
