"""The cache of fetched shards: whose it is, what is served from it, and where a redirect may lead."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import socket
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from faulty_server import always, serve
from tiny_shards import loader, plain_samples, take, write_prepared, write_tar

import evatool.data.sources.cache as cache_module
from evatool.core.errors import DataError
from evatool.core.own_folder import NotOursError
from evatool.data.sources.cache import ShardCache, default_cache_folder
from evatool.data.sources.fetch import FetchError, Patience, fetch_bytes
from evatool.data.sources.redirects import RefusedRedirectError, Way

PATIENCE = Patience(2, 2.0, 0.01)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a folder to someone else")


@pytest.fixture
def default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default folder, below a temporary folder of the test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return default_cache_folder()


def cache(folder: Path | None = None, max_bytes: int = 10**8) -> ShardCache:
    return ShardCache(folder, max_bytes, PATIENCE)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ------------------------------------------------------------------------------------------------------ whose it is


def test_the_default_folder_is_ours_alone(tmp_path: Path, default: Path) -> None:
    (tmp_path / "srv").mkdir()
    (tmp_path / "srv/0.tar").write_bytes(b"x" * 5000)
    before = os.umask(0)
    try:
        with serve(tmp_path / "srv") as server:
            found = cache().get(f"{server.url}/0.tar")
        with cache().alone():
            pass
    finally:
        os.umask(before)
    for path in (default, *default.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path
    assert found.parent == default


@needs_root
def test_a_default_folder_that_another_user_made_is_refused(tmp_path: Path, default: Path) -> None:
    """With a shard in it that would be served, and a lock that is a link to be written through."""
    url = "http://127.0.0.1:9/0.tar"
    (default / "locks").mkdir(parents=True)
    (default / "locks/scan").symlink_to(tmp_path / "made-through-the-link")
    (default / ShardCache.path(cache(tmp_path / "other"), url).name).write_bytes(b"not the shard")
    default.chmod(0o777)
    os.chown(default, 12_345, 12_345)
    unused = cache()  # by a run of local shards alone
    with pytest.raises(NotOursError, match="not ours") as caught:
        unused.get(url)
    assert "data.remote.cache_dir" in (caught.value.fix or "")
    assert not (tmp_path / "made-through-the-link").exists()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path, default: Path) -> None:
    found = cache()
    with found.alone():  # its first use makes the folder
        (default / "locks/scan").unlink()
    (default / "locks/scan").symlink_to(tmp_path / "outside")
    with pytest.raises(NotOursError, match="link"), found.alone():
        pass
    assert not (tmp_path / "outside").exists()


def test_a_named_folder_that_everyone_can_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o1777)
    with pytest.raises(NotOursError, match="not ours") as caught:
        cache(tmp_path / "shared")
    assert "not everyone" in (caught.value.expected or "")


# ------------------------------------------------------------------------------------------------- what is served


@pytest.mark.parametrize("fault", ["cut", "other bytes", "link", "open to others"])
def test_a_shard_that_is_not_as_it_was_fetched_is_fetched_again(
    tmp_path: Path, default: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "srv").mkdir()
    data = bytes(range(256)) * 40
    (tmp_path / "srv/0.tar").write_bytes(data)
    with serve(tmp_path / "srv") as server:
        known = {"size": len(data), "sha256": sha256(data)} if fault == "other bytes" else {}
        url = f"{server.url}/0.tar"
        found = cache().get(url, **known)
        if fault == "cut":
            os.truncate(found, 100)
        elif fault == "other bytes":
            found.write_bytes(data[::-1])
        elif fault == "link":
            found.rename(tmp_path / "elsewhere")
            found.symlink_to(tmp_path / "elsewhere")
        else:
            found.chmod(0o666)
        assert cache().get(url, **known).read_bytes() == data
        assert not found.is_symlink()
        assert "is fetched again" in caplog.text
        assert server.requests["0.tar"] == 2


def test_a_checksum_is_computed_once_a_file(tmp_path: Path, default: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without a note, as an older version left it; afterwards the note tells, until the file is another."""
    (tmp_path / "srv").mkdir()
    data = b"y" * 9000
    (tmp_path / "srv/0.tar").write_bytes(data)
    hashed: list[int] = []
    from evatool.data.sources import cache as module

    compute = module._checksum
    monkeypatch.setattr(module, "_checksum", lambda handle: hashed.append(handle) or compute(handle))
    with serve(tmp_path / "srv") as server:
        url = f"{server.url}/0.tar"
        found = cache().get(url, size=9000, sha256=sha256(data))
        assert not hashed  # it was looked at while it came
        found.with_suffix(".note").unlink()
        for _ in range(3):
            cache().get(url, size=9000, sha256=sha256(data))
        assert len(hashed) == 1
        os.utime(found, ns=(0, 0))
        cache().get(url, size=9000, sha256=sha256(data))
        assert len(hashed) == 2
        assert server.requests["0.tar"] == 1


def test_what_was_not_used_longest_goes_first(tmp_path: Path, default: Path) -> None:
    (tmp_path / "srv").mkdir()
    for i in range(4):
        (tmp_path / f"srv/{i}.tar").write_bytes(bytes([i]) * 1000)
    with serve(tmp_path / "srv") as server:
        small = cache(max_bytes=3500)
        paths = [small.get(f"{server.url}/{i}.tar") for i in range(3)]
        for i, path in enumerate(paths):
            os.utime(path.with_suffix(".note"), (i, i))
        small.get(f"{server.url}/0.tar")  # used again
        small.get(f"{server.url}/3.tar")
    assert [path.exists() for path in paths] == [True, False, True]
    assert not paths[1].with_suffix(".note").exists()


def test_unfinished_files_go_with_their_writer_whatever_the_clock_says(
    tmp_path: Path, default: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R27: the age of a file says nothing where clocks jump; who holds it does."""
    (tmp_path / "srv").mkdir()
    for i in range(2):
        (tmp_path / f"srv/{i}.tar").write_bytes(b"x" * 1000)
    cache().index_folder()
    dead = [default / ".a.1.1.partial", default / ".b.1.1.note.partial"]
    for path in dead:
        path.write_bytes(b"x")
        path.chmod(0o600)
    seen: list[str] = []
    fetch_file = cache_module.fetch_file

    def fetch(url: str, file: BinaryIO, *args: Any, **options: Any) -> None:
        fetch_file(url, file, *args, **options)
        if url.endswith("0.tar"):
            (own,) = [path for path in default.glob(".*.partial") if path not in dead]
            os.utime(own, (0, 0))  # ages old
            cache().get(f"{server.url}/1.tar")  # another process finishes its own and clears up
            seen.extend(path.name for path in (own, *dead) if path.exists())
            assert seen == [own.name]

    monkeypatch.setattr(cache_module, "fetch_file", fetch)
    with serve(tmp_path / "srv") as server:
        assert cache().get(f"{server.url}/0.tar").read_bytes() == b"x" * 1000
    assert seen
    assert not list(default.glob(".*.partial"))


# -------------------------------------------------------------------------------------------------------- redirects


@pytest.mark.parametrize(
    ("hops", "is_followed"),
    [
        ("8.8.8.8 1.1.1.1", True),
        ("8.8.8.8 10.0.0.1", False),
        ("8.8.8.8 127.0.0.1", False),
        ("8.8.8.8 ::1", False),
        ("8.8.8.8 ::ffff:127.0.0.1", False),
        ("8.8.8.8 64:ff9b::7f00:1", False),
        ("8.8.8.8 169.254.169.254", False),
        ("8.8.8.8 0.0.0.0", False),
        ("8.8.8.8 100.64.0.1", False),
        ("8.8.8.8 fd00::1", False),
        ("8.8.8.8 1.1.1.1 192.168.0.1", False),
        ("8.8.8.8 2130706433", False),
        ("10.0.0.1 192.168.0.1", True),
        ("10.0.0.1 8.8.8.8 10.0.0.2", False),
        ("10.0.0.1 127.0.0.1", False),
        ("127.0.0.1 127.0.0.1", True),
        ("127.0.0.1 10.0.0.1", False),
        ("10.0.0.1", True),
        ("::1", True),
    ],
)
def test_where_a_redirect_may_lead(hops: str, is_followed: bool) -> None:
    """Addresses in numbers, which need no name server; the recipe's own comes first."""
    for allow_private in (False, True):
        way = Way(allow_private)
        *before, last = hops.split()
        for host in before:
            way.addresses(host, 80)
        if is_followed or allow_private:
            assert way.addresses(last, 80)
        else:
            with pytest.raises(RefusedRedirectError, match="allow_private_redirects"):
                way.addresses(last, 80)


def test_a_redirect_to_another_service_of_this_machine_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"secret of another service")
    with serve(tmp_path) as first, serve(tmp_path) as second:
        first.faults["0.tar"] = always(f"redirect {second.url}/0.tar")
        url = f"{first.url}/0.tar"
        with pytest.raises(FetchError, match="allow_private_redirects") as caught:
            fetch_bytes(url, PATIENCE, 10**6)
        assert caught.value.cause == "refused-redirect"
        assert (first.requests["0.tar"], second.requests["0.tar"]) == (1, 0)  # it is not tried again
        allowed = Patience(2, 2.0, 0.01, allow_private_redirects=True)
        assert fetch_bytes(url, allowed, 10**6) == b"secret of another service"


def test_a_password_in_a_url_is_for_its_server_alone(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"x")
    allowed = Patience(1, 2.0, 0.01, allow_private_redirects=True)
    with serve(tmp_path) as first, serve(tmp_path) as second:
        first.faults["0.tar"] = always(f"redirect {second.url}/0.tar")
        assert fetch_bytes(f"{first.url}/0.tar".replace("://", "://me:p%40ss@"), allowed, 10**6) == b"x"
        assert first.authorizations == ["Basic " + base64.b64encode(b"me:p@ss").decode()]
        assert second.authorizations == [None]


def test_a_redirect_within_a_server_is_followed(tmp_path: Path) -> None:
    (tmp_path / "1.tar").write_bytes(b"moved")
    (tmp_path / "0.tar").write_bytes(b"")
    with serve(tmp_path) as server:
        server.faults["0.tar"] = always("redirect /1.tar")
        assert fetch_bytes(f"{server.url}/0.tar", PATIENCE, 10**6) == b"moved"


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/x", "file:///etc/hostname", "gopher://h/x"])
def test_a_redirect_leads_to_the_web_or_nowhere(tmp_path: Path, target: str) -> None:
    (tmp_path / "0.tar").write_bytes(b"")
    allowed = Patience(2, 2.0, 0.01, allow_private_redirects=True)
    with serve(tmp_path) as server:
        server.faults["0.tar"] = always(f"redirect {target}")
        with pytest.raises(FetchError, match="is not followed"):
            fetch_bytes(f"{server.url}/0.tar", allowed, 10**6)


def test_a_name_is_resolved_once_a_hop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that gives a good address to whoever judges it, and another one to whoever connects."""
    (tmp_path / "0.tar").write_bytes(b"here")
    resolve, asked = socket.getaddrinfo, []

    def changing(host: str, *args: object, **options: object) -> object:
        if host == "shards.example":
            asked.append(host)
            host = "127.0.0.1" if len(asked) == 1 else "127.0.0.2"
        return resolve(host, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", changing)
    with serve(tmp_path) as server:
        url = f"{server.url}/0.tar".replace("127.0.0.1", "shards.example")
        assert fetch_bytes(url, PATIENCE, 10**6) == b"here"
    assert asked == ["shards.example"]


def test_a_run_says_how_a_redirect_is_allowed(tmp_path: Path) -> None:
    """From the recipe's key to the shard, through manifest and cache."""
    write_prepared(tmp_path / "srv", 32, 32)
    with serve(tmp_path / "srv") as first, serve(tmp_path / "srv") as second:
        for name in ("manifest.json", "00000.tar"):
            first.faults[name] = always(f"redirect {second.url}/{name}")
        remote = {"cache_dir": str(tmp_path / "cache"), "attempts": 1, "allow_private_redirects": False}
        section = {"sources": [{"name": "s", "shards": first.url}], "remote": remote}
        with pytest.raises(DataError, match="allow_private_redirects"):
            loader(section)
        section["remote"] = remote | {"allow_private_redirects": True}
        assert len(take(loader(section), 1)) == 1


# ----------------------------------------------------------------------------------------------- names of members


def test_names_of_members_do_nothing_to_the_log(tmp_path: Path) -> None:
    """From a tar to the run's log: nothing in it acts on a terminal that shows it, no name is a line of its own."""
    from evatool.core import logging as logs

    samples = plain_samples(range(40))
    for name in ("a\x1b[31m", "b\nerror: forged", "c\u202egpj"):
        samples[name] = {"png": b"no picture", "txt": b"words"}
    write_tar(tmp_path / "0.tar", samples)
    handler = logs.add_file(tmp_path / "logs")
    log = logging.getLogger("evatool")
    before = log.level
    log.setLevel(logging.INFO)
    try:
        take(loader({"train": str(tmp_path / "0.tar"), "max_bad_fraction": 0.5}), 3)
    finally:
        log.setLevel(before)
        log.removeHandler(handler)
        handler.close()
    text = (tmp_path / "logs/rank_00000.log").read_text(encoding="utf-8")
    assert text.replace("\n", "").isprintable()
    for name in (r"a\x1b[31m", r"b\nerror: forged", r"c\u202egpj"):
        assert name in text
    assert json.dumps(text).count("forged") == 1
