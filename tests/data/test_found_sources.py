"""Ways in which people name their shards: odd paths, folders of other tools, counts beside tars, links, commands."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shutil
import signal
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny_shards import add_member, keys, loader, plain_samples, take, write_prepared, write_tar

from evatool.core.errors import BadDataLimitError, DataError, TransientError
from evatool.data.sources.cache import ShardCache
from evatool.data.sources.fetch import Patience
from evatool.data.sources.shard_list import ShardList, expand, open_shard_list
from evatool.data.sources.stream import MAX_HEADER_BYTES, read_samples
from evatool.data.tar.index import scan_file

PATIENCE = Patience(2, 2.0, 0.01)


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 10**8, PATIENCE)


def open_(spec: str | list[str], cache: ShardCache) -> ShardList:
    return open_shard_list("s", spec, cache=cache, patience=PATIENCE, max_bad_fraction=0.0)


# ---------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("folder", ["set[v2]", "a*b", "what?", "{x}", "{a,b}", "[0-9]", "set [v2] {1..3}*"])
@pytest.mark.parametrize("rest", ["", "/{0..1}.tar", "/*.tar", "/[01].tar", "/0.tar"])
def test_what_exists_is_a_path_whatever_is_in_its_name(
    tmp_path: Path, folder: str, rest: str, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        write_tar(tmp_path / folder / f"{number}.tar", plain_samples(range(3)))
    write_tar(tmp_path / "setv" / "0.tar", plain_samples(range(3)))  # what `set[v2]` would match as a glob
    expected = [f"{folder}/{number}.tar" for number in range(1 if rest == "/0.tar" else 2)]
    found = open_(f"{tmp_path}/{folder}{rest}", cache).urls
    assert found == [f"{tmp_path}/{name}" for name in expected]
    monkeypatch.chdir(tmp_path)
    assert open_(f"{folder}{rest}", cache).urls == expected


def test_a_tar_with_brackets_in_its_name_is_that_tar(tmp_path: Path, cache: ShardCache) -> None:
    path = write_tar(tmp_path / "set[v2].tar", plain_samples(range(3)))
    write_tar(tmp_path / "setv.tar", plain_samples(range(3)))
    assert open_(str(path), cache).urls == [str(path)]
    assert expand(f"{tmp_path}/set[v].tar") == [f"{tmp_path}/setv.tar"]


def test_file_names_that_are_not_utf8(tmp_path: Path, cache: ShardCache) -> None:
    raw = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.tar")
    os.replace(write_tar(tmp_path / "0.tar", plain_samples(range(16))), raw)
    found = open_(f"{tmp_path}/*.tar", cache)
    assert found.counts.tolist() == [16]
    assert keys(take(loader({"train": tmp_path, "max_bad_fraction": 0.0}), 1))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("a.tar.gz", r"compressed[\s\S]*gzip -d[\s\S]*sequential = true"),
        ("a.tgz", "compressed"),
        ("s3://bucket/{0..3}.tar.zst", r"compressed[\s\S]*zstd -d"),
        ("a.tar::b.tar", r"webdataset's `a::b` as a list"),
        ("simplecache::s3://bucket/a.tar", r"data.remote.cache_dir"),
        ("s4://bucket/a.tar", r"no protocol is called 's4'[\s\S]*did you mean s3://"),
        ("x-y+z://bucket/", "no protocol is called"),
    ],
)
def test_what_other_tools_read_is_named_with_what_to_write(spec: str, message: str, cache: ShardCache) -> None:
    for specs in (spec, [spec, "b.tar"]):
        with pytest.raises(DataError, match=message):
            open_(specs, cache)


@pytest.mark.parametrize("spec", ["a\0.tar", "a\0b", "a\0*.tar", "{a\0,b}.tar"])
def test_a_zero_byte_in_a_name_is_no_internal_error(spec: str, cache: ShardCache) -> None:
    with pytest.raises(DataError):
        open_(spec, cache)


@pytest.mark.parametrize(
    "change",
    [
        {"file": "a\0.tar"},
        {"file": 5},
        {"num_samples": 2**70},
        {"num_samples": None},
        {"num_samples": -3},
        {"bytes": [1]},
        {"index": "../x"},
    ],
    ids=str,
)
def test_a_manifest_of_nonsense_is_no_internal_error(tmp_path: Path, change: dict[str, Any], cache: ShardCache) -> None:
    folder = write_prepared(tmp_path / "set", 4, 4)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0] |= change
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="manifest"):
        open_(str(folder), cache)
    (folder / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="nested"):
        open_(str(folder), cache)


# --------------------------------------------------------------------------------------------- folders and counts


def img2dataset(folder: Path, counts: list[int]) -> Path:
    """A folder as img2dataset leaves it."""
    for number, count in enumerate(counts):
        write_tar(folder / f"{number:05d}.tar", plain_samples(range(count)))
        (folder / f"{number:05d}.parquet").write_bytes(b"PAR1")
        stats = {"count": count + 3, "successes": count, "failed_to_download": 3, "status_dict": {"success": count}}
        (folder / f"{number:05d}_stats.json").write_text(json.dumps(stats))
    return folder


def test_the_folder_of_img2dataset_is_taken_as_it_is(
    tmp_path: Path, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = img2dataset(tmp_path / "laion", [5, 4, 6])
    monkeypatch.setattr("evatool.data.sources.plain_tars.NUM_CHECKED", 2)
    found = open_(str(folder), cache)
    assert found.counts.tolist() == [5, 4, 6]
    assert found.indexes[1] is None  # its count was believed
    assert found.digest() == open_(f"{folder}/{{00000..00002}}.tar", cache).digest()
    assert len(keys(take(loader({"train": folder, "max_bad_fraction": 0.0}, global_batch_size=15), 1))) == 15
    memory = fsspec.filesystem("memory")
    for path in folder.glob("*"):
        memory.pipe(f"/{tmp_path.name}/{path.name}", path.read_bytes())
    assert open_(f"memory://{tmp_path.name}", cache).counts.tolist() == [5, 4, 6]


def test_an_unfinished_folder_of_data_prepare_is_still_refused(tmp_path: Path, cache: ShardCache) -> None:
    folder = write_prepared(tmp_path / "set", 8, 4)
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="it is not finished"):
        open_(str(folder), cache)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-1", "4.5", "true", '"5"', "null", "1e30", "7", "3", "[5]"])
@pytest.mark.parametrize("kind", ["sizes.json", "_stats.json"])
def test_counts_that_are_wrong_are_said_and_the_tars_scanned(
    tmp_path: Path, cache: ShardCache, value: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        tar = write_tar(tmp_path / "set" / f"{number}.tar", plain_samples(range(5)))
        (tmp_path / "set" / f"{number}_stats.json").write_text(f'{{"successes": {value if number == 1 else 5}}}')
    if kind == "sizes.json":
        (tar.parent / kind).write_text(f'{{"0.tar": 5, "1.tar": {value}, "2.tar": 5}}')
    assert open_(f"{tmp_path}/set/*.tar", cache).counts.tolist() == [5, 5, 5]
    is_number = value in ("7", "3")
    assert ("are wrong" if is_number else "is scanned") in caplog.text
    assert "1.tar" in caplog.text


@pytest.mark.parametrize("text", ["[]", "{", "", '{"0.tar": 5}', "[" * 5000])
def test_a_sizes_file_that_says_nothing_is_passed_over(tmp_path: Path, cache: ShardCache, text: str) -> None:
    for number in range(2):
        write_tar(tmp_path / "set" / f"{number}.tar", plain_samples(range(5)))
    (tmp_path / "set" / "sizes.json").write_text(text)
    assert open_(f"{tmp_path}/set/*.tar", cache).counts.tolist() == [5, 5]


def test_what_a_damaged_tar_lost_is_not_taken_for_a_wrong_count(tmp_path: Path, cache: ShardCache) -> None:
    tar = write_tar(tmp_path / "set" / "0.tar", plain_samples(range(5)))
    (tmp_path / "set" / "sizes.json").write_text('{"0.tar": 5}')
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    for _ in range(2):  # scanned, then from the index
        assert open_(str(tar), cache).counts.tolist() == [5]


@pytest.mark.parametrize("linked", ["file", "folder"])
def test_no_index_is_written_into_the_data_set_that_a_link_leads_to(
    tmp_path: Path, cache: ShardCache, linked: str
) -> None:
    tar = write_tar(tmp_path / "theirs" / "0.tar", plain_samples(range(5)))
    if linked == "file":
        (tmp_path / "ours").mkdir()
        (tmp_path / "ours" / "0.tar").symlink_to(tar)
    else:
        (tmp_path / "ours").symlink_to(tar.parent)
    for _ in range(2):
        found = open_(f"{tmp_path}/ours/*.tar", cache)
        assert found.counts.tolist() == [5]
        assert Path(str(found.indexes[0])).is_relative_to(cache.folder)
    assert sorted(path.name for path in tmp_path.rglob("*.index.json")) == []
    shutil.rmtree(cache.folder / "indexes")
    own = open_(str(tar), cache)  # whoever names it without a link keeps the index beside it
    assert own.indexes == [str(tar) + ".index.json"]


# -------------------------------------------------------------------------------------------------------- streams


def stream(shards: str | list[str], **options: Any) -> dict[str, Any]:
    return {"sources": [{"name": "s", "shards": shards, **options}], "max_bad_fraction": 0.0}


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "tar": bytes,
    "tar.gz": gzip.compress,
    "tar.bz2": bz2.compress,
    "tar.xz": lzma.compress,
}


@pytest.mark.parametrize("suffix", PACKERS)
def test_compressed_tars_are_read_in_their_order(tmp_path: Path, suffix: str) -> None:
    for number in range(2):
        tar = write_tar(tmp_path / f"{number}.tar", plain_samples(range(8 * number, 8 * number + 8)))
        (tmp_path / f"{number}.{suffix}").write_bytes(PACKERS[suffix](tar.read_bytes()))
    section = stream(f"{tmp_path}/{{0..1}}.{suffix}", sequential=True)
    found = loader(section, global_batch_size=8)
    assert found.num_samples == 16
    expected = [f"k{i:05d}" for i in range(16)]
    assert keys(take(found, 4)) == [*expected, *expected]
    assert keys(take(loader(section, global_batch_size=8, position=8), 1)) == expected[8:]


def test_a_command_is_read_where_the_recipe_allows_it(tmp_path: Path) -> None:
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", plain_samples(range(8 * number, 8 * number + 8)))
    command = f"pipe:cat {tmp_path}/{{0..1}}.tar"
    section = stream(command, allow_pipe=True)
    alone = take(loader(section, global_batch_size=8), 4)
    assert keys(alone) == [f"k{i:05d}" for i in range(16)] * 2
    known = loader(stream(command, allow_pipe=True, num_samples=16), global_batch_size=8, rank=1, world_size=2)
    assert [b.keys for b in take(known, 4)] == [b.keys[1::2] for b in alone]
    awk = stream(f"pipe:cat {tmp_path}/0.tar | awk '{{print}}' >/dev/null; cat {tmp_path}/1.tar", allow_pipe=True)
    assert keys(take(loader(awk, global_batch_size=8), 1)) == [f"k{i:05d}" for i in range(8, 16)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"shards": "pipe:touch made"}, "allow_pipe = true"),
        ({"shards": ["pipe:touch made"], "allow_pipe": True}, "not in a list"),
        ({"shards": ["a.tar", "pipe:touch made"], "allow_pipe": True}, "not in a list"),
        ({"shards": "pipe:touch made", "sequential": True}, "allow_pipe = true"),
        ({"shards": "a.tar", "allow_pipe": True}, "has no effect"),
        ({"shards": "a.tar", "num_samples": 5}, "has no effect"),
    ],
)
def test_no_command_runs_by_accident(
    tmp_path: Path, source: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValidationError, match=message):
        loader({"sources": [{"name": "s", **source}]})
    with pytest.raises(ValidationError, match="into `sources`"):
        loader({"train": "pipe:touch made"})
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["pipe:touch made;.tar", "manifest"])
def test_names_of_files_are_no_commands(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "manifest":
        folder = write_prepared(tmp_path / "set", 4, 4)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["shards"][0]["file"] = "pipe:touch made"
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(BadDataLimitError, match="are gone"):
            loader(stream(str(folder)))
    else:
        write_tar(tmp_path / name, plain_samples(range(8)))
        for options in ({}, {"sequential": True}):
            assert len(keys(take(loader(stream("*.tar", **options), global_batch_size=8), 1))) == 8
    assert not (tmp_path / "made").exists()


def test_a_command_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read: the command 'exit 3'[\s\S]*try the command in a shell"):
        loader(stream("pipe:exit 3", allow_pipe=True))
    tar = write_tar(tmp_path / "0.tar", plain_samples(range(8)))
    broken = stream(f"pipe:head -c 9000 {tar}; exit 3", allow_pipe=True, num_samples=8)
    with pytest.raises(BadDataLimitError, match=r"8 of 8 samples cannot be read \(8 stream-failed"):
        take(loader(broken, global_batch_size=8), 1)


def test_a_command_that_hangs_ends_the_wait_and_itself(tmp_path: Path) -> None:
    section = stream(f"pipe:echo $$ > {tmp_path}/pid; exec sleep 600", allow_pipe=True, num_samples=8)
    start = time.monotonic()
    with pytest.raises(TransientError, match="timeout"):
        take(loader({**section, "max_wait_sec": 0.5}, global_batch_size=8), 1)
    assert time.monotonic() - start < 10
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGCONT)


def test_a_header_that_claims_gigabytes_is_not_believed(tmp_path: Path) -> None:
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 2**33
    bomb = gzip.compress(header.tobuf(tarfile.GNU_FORMAT) + bytes(2 * MAX_HEADER_BYTES))
    (tmp_path / "bomb.tar.gz").write_bytes(bomb)
    with pytest.raises(DataError, match="claims more than is read"):
        loader(stream(f"{tmp_path}/bomb.tar.gz", sequential=True))


@given(
    names=st.lists(
        st.sampled_from(["a.jpg", "a.txt", "b/c.jpg", "._a.jpg", "README", "b/c.TXT", "__meta__/x.txt", "é.jpg"]),
        max_size=9,
    )
)
@settings(max_examples=30, deadline=None)
def test_a_stream_is_grouped_as_a_scan_is(names: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("tar") / "0.tar"
    with tarfile.open(path, "w") as tar:
        for name in names:
            add_member(tar, name, b"x")
    found = scan_file(path)
    scanned = [(found.key(n), {name for name, _ in found.members(n)}) for n in range(len(found))]
    with path.open("rb") as file:
        assert [(key, set(fields)) for key, fields in read_samples(file)] == scanned


def test_a_folder_of_streams_is_mixed_with_others(tmp_path: Path) -> None:
    folder = write_prepared(tmp_path / "set", 16, 8, "p")
    tar = write_tar(tmp_path / "0.tar", plain_samples(range(16)))
    shutil.copy(tar, tmp_path / "copy.tar")
    section = stream(f"{tmp_path}/copy.tar", sequential=True)
    section["sources"].append({"name": "p", "shards": str(folder)})
    assert {key[0] for key in keys(take(loader(section), 4))} == {"k", "p"}
