"""Folders of caches: whose they are, and what is in the way of an open."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from evatool.core.own_folder import NotOursError, OwnFolder, expand_user, user_cache_folder

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a folder to someone else")
SOMEONE = 12_345


def own(path: Path, *, is_named: bool = False) -> OwnFolder:
    return OwnFolder(path, is_named=is_named, fix="mend it")


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_folder_of_ours_is_made_for_us_alone(tmp_path: Path) -> None:
    with own(tmp_path / "a/b").opened("inner"):
        assert mode_of(tmp_path / "a/b") == 0o700
        assert mode_of(tmp_path / "a/b/inner") == 0o700


def test_what_an_older_umask_left_is_closed_to_others(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir(mode=0o755)
    with own(tmp_path / "mine").opened():
        assert mode_of(tmp_path / "mine") == 0o700


@needs_root
@pytest.mark.parametrize("mode", [0o700, 0o755, 0o777])
def test_a_folder_of_another_user_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "theirs"
    path.mkdir()
    path.chmod(mode)
    os.chown(path, SOMEONE, SOMEONE)
    with pytest.raises(NotOursError, match=f"not ours.*user {SOMEONE}"), own(path).opened():
        pass


@pytest.mark.parametrize("is_named", [False, True])
def test_a_folder_that_everyone_can_write_is_refused(tmp_path: Path, is_named: bool) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(NotOursError, match="not ours"), own(tmp_path, is_named=is_named).opened():
        pass


@needs_root
def test_a_named_folder_may_be_shared(tmp_path: Path) -> None:
    tmp_path.chmod(0o775)
    os.chown(tmp_path, SOMEONE, SOMEONE)
    with own(tmp_path, is_named=True).opened() as folder:
        os.close(own(tmp_path, is_named=True).open_file(folder, "x", os.O_RDWR | os.O_CREAT))


def test_no_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    with pytest.raises(NotOursError, match="link"), own(tmp_path / "link").opened():
        pass
    folder = tmp_path / "mine"
    with own(folder).opened():
        pass
    (folder / "inner").symlink_to(tmp_path / "precious")
    with pytest.raises(NotOursError, match="link"), own(folder).opened("inner"):
        pass
    (folder / "lock").symlink_to(tmp_path / "precious/file")
    os.mkfifo(folder / "pipe")
    for name in ("lock", "pipe"):
        with own(folder).opened() as handle, pytest.raises(NotOursError, match="no regular file"):
            own(folder).open_file(handle, name, os.O_RDWR | os.O_CREAT, is_lock=True)
    assert (tmp_path / "precious/file").read_text() == "precious"


def test_a_file_that_others_can_change_is_not_trusted(tmp_path: Path) -> None:
    folder = own(tmp_path / "mine")
    with folder.opened() as handle:
        for name, mode in (("open", 0o666), ("group", 0o664), ("twice", 0o600), ("good", 0o644)):
            (tmp_path / "mine" / name).touch()
            (tmp_path / "mine" / name).chmod(mode)
        os.link(tmp_path / "mine/twice", tmp_path / "elsewhere")
        for name in ("open", "group", "twice"):
            with pytest.raises(NotOursError, match="written by others"):
                folder.open_file(handle, name, os.O_RDONLY)
        os.close(folder.open_file(handle, "good", os.O_RDONLY))


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return tmp_path / "tmp"


def test_the_cache_is_in_the_home_where_there_is_one(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert user_cache_folder() == tmp_path / "home/.cache/evatool"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert user_cache_folder() == tmp_path / "cache/evatool"


@pytest.mark.parametrize("home", ["/proc/nowhere", "~", "/dev/null"])
def test_without_a_usable_home_the_cache_is_in_the_temporary_folder(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    monkeypatch.setenv("HOME", home)
    found = user_cache_folder()
    assert found == temporary / f"evatool-cache-{os.getuid()}"
    assert mode_of(found) == 0o700


@needs_root
def test_a_cache_folder_of_another_user_is_not_used(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "evatool").mkdir()
    os.chown(tmp_path / "evatool", SOMEONE, SOMEONE)
    assert user_cache_folder() == temporary / f"evatool-cache-{os.getuid()}"
    assert "not ours" in caplog.text
    os.chown(temporary / f"evatool-cache-{os.getuid()}", SOMEONE, SOMEONE)
    assert user_cache_folder() is None
    assert "nothing is kept" in caplog.text


def test_a_tilde_without_a_home_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert expand_user("~no-such-user/x") == Path("~no-such-user/x")
    monkeypatch.setenv("HOME", "/somewhere")
    assert expand_user(Path("~/x")) == Path("/somewhere/x")
