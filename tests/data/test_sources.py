from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from faulty_server import serve
from tiny_shards import keys, loader, plain_samples, take, write_prepared, write_tar

from evatool.core.errors import BadDataLimitError, DataError
from evatool.data.sources import plain_tars
from evatool.data.sources import shard_list as sources
from evatool.data.sources.cache import ShardCache
from evatool.data.sources.fetch import Patience, display_url
from evatool.data.sources.shard_list import ShardList, expand, open_shard_list
from evatool.data.tar.manifest import FORMAT, MANIFEST
from evatool.data.train.shuffle import ShuffledOrder

PATIENCE = Patience(2, 2.0, 0.01)


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 10**8, PATIENCE)


def open_(spec: str | list[str], cache: ShardCache, limit: float = 0.0) -> ShardList:
    return open_shard_list("s", spec, cache=cache, patience=PATIENCE, max_bad_fraction=limit)


def test_brace_lists() -> None:
    assert expand("a/{000..002}.tar") == ["a/000.tar", "a/001.tar", "a/002.tar"]
    assert expand("{8..11}-{x,y}.tar")[:3] == ["8-x.tar", "8-y.tar", "9-x.tar"]
    assert expand("{8..11}.tar")[-1] == "11.tar"
    # The released commands' two lists: 164,091 and 47,436 shards.
    assert len(expand("s3://l/{000000..164090}.tar")) == 164_091
    assert expand("s3://c/{000000..047435}.tar")[-1] == "s3://c/047435.tar"


def test_globs_are_sorted(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "c.txt"):
        (tmp_path / name).touch()
    assert expand(f"{tmp_path}/*.tar") == [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]
    assert expand(f"file://{tmp_path}/[b]*.tar") == [f"{tmp_path}/b.tar"]


def test_a_prepared_folder_and_its_tars_are_the_same_samples(tmp_path: Path, cache: ShardCache) -> None:
    folder = write_prepared(tmp_path / "set", 30, 8)
    prepared = open_(str(folder), cache)
    assert open_(str(folder / "manifest.json"), cache).urls == prepared.urls
    plain = open_(f"{folder}/*.tar", cache)
    assert plain.urls == prepared.urls
    assert plain.counts.tolist() == prepared.counts.tolist() == [8, 8, 8, 6]
    assert plain.sizes.tolist() == prepared.sizes.tolist()
    assert plain.digest() == prepared.digest()
    section = {"caption": "txt"}
    a = take(loader({**section, "train": folder}), 3)
    b = take(loader({**section, "train": f"{folder}/*.tar"}), 3)
    assert keys(a) == keys(b)


def test_plain_tars_are_scanned_once(tmp_path: Path, cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in range(3):
        write_tar(tmp_path / "set" / f"{shard}.tar", plain_samples(range(shard * 5, shard * 5 + 5)))
    spec = f"{tmp_path}/set/{{0..2}}.tar"
    assert open_(spec, cache).counts.tolist() == [5, 5, 5]
    monkeypatch.setattr("evatool.data.sources.plain_tars.scan_file", lambda path: pytest.fail(f"{path} scanned again"))
    again = open_(spec, cache)
    assert again.counts.tolist() == [5, 5, 5]
    assert again.indexes[0] == str(tmp_path / "set" / "0.tar.index.json")
    monkeypatch.undo()
    # Another tar under the same name is seen by its size and time.
    write_tar(tmp_path / "set" / "1.tar", plain_samples(range(4)))
    assert open_(spec, cache).counts.tolist() == [5, 4, 5]


def test_where_the_folder_cannot_be_written_the_index_goes_to_the_cache(
    tmp_path: Path, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = write_tar(tmp_path / "set" / "0.tar", plain_samples(range(5)))
    write = plain_tars.write_bytes_atomically

    def refuse(path: Path, data: bytes) -> None:
        if path.parent == tar.parent:
            raise PermissionError("read-only")
        write(path, data)

    monkeypatch.setattr(plain_tars, "write_bytes_atomically", refuse)
    assert Path(open_(str(tar), cache).indexes[0]).parent == cache.folder / "indexes"
    assert open_(str(tar), cache).counts.tolist() == [5]


def test_counts_of_sizes_json_spare_most_scans(
    tmp_path: Path, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shard in range(7):
        write_tar(tmp_path / "set" / f"{shard}.tar", plain_samples(range(5)))
    (tmp_path / "set" / "sizes.json").write_text(json.dumps({f"{i}.tar": 5 for i in range(9)}))
    monkeypatch.setattr(plain_tars, "NUM_CHECKED", 3)
    found = open_(f"{tmp_path}/set/{{0..6}}.tar", cache)
    assert found.counts.tolist() == [5] * 7
    assert [index is not None for index in found.indexes] == [True, False, False, True, False, False, True]
    section = {"train": f"{tmp_path}/set/{{0..1}}.tar"}
    assert len(set(keys(take(loader(section, global_batch_size=10), 1)))) == 5  # both hold keys k00000 to k00004


def test_a_listed_shard_that_is_not_there_is_left_out_within_the_limit(
    tmp_path: Path, cache: ShardCache, caplog: pytest.LogCaptureFixture
) -> None:
    for shard in range(9):
        write_tar(tmp_path / "set" / f"{shard}.tar", plain_samples(range(5)))
    spec = f"{tmp_path}/set/{{0..9}}.tar"
    with pytest.raises(BadDataLimitError, match="1 of 10 shards of source 's' cannot be read") as caught:
        open_(spec, cache, limit=0.05)
    assert "9.tar" in str(caught.value)
    assert open_(spec, cache, limit=0.1).counts.tolist() == [5] * 9 + [0]
    assert "9.tar cannot be read and is left out" in caplog.text


def test_a_prepared_folder_that_lost_too_much_is_refused_before_the_run(tmp_path: Path, cache: ShardCache) -> None:
    folder = write_prepared(tmp_path / "set", 40, 4)
    (folder / "00003.tar").unlink()
    tar = folder / "00005.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    with pytest.raises(BadDataLimitError, match="about 6 of 40 samples") as caught:
        open_(str(folder), cache, limit=0.1)
    assert "00003.tar: missing" in str(caught.value)
    assert caught.value.exit_code == 78
    assert open_(str(folder), cache, limit=0.2).num_samples == 40


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("*.tar", "names no shard"),
        ("a.tgz", "the tars are compressed"),
        (["a.tar", "b.zip"], "which is no tar"),
        ("https://host/*.tar", "a web server cannot list its files"),
    ],
)
def test_what_names_no_shards_is_refused(
    spec: str | list[str], message: str, cache: ShardCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        open_(spec, cache)


def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path: Path, cache: ShardCache) -> None:
    folder = write_prepared(tmp_path / "set", 4, 4)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["file"] = "../other/00000.tar"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="leads out of the folder"):
        open_(str(folder), cache)


# ---------------------------------------------------------------------------------------------------------- remote


@pytest.mark.parametrize("protocol", ["http", "memory"])
@pytest.mark.parametrize("kind", ["manifest", "tars", "sizes"])
def test_remote_shards_give_the_batches_of_local_ones(tmp_path: Path, protocol: str, kind: str) -> None:
    folder = write_prepared(tmp_path / "set", 40, 8)
    (folder / "sizes.json").write_text(json.dumps({f"0000{i}.tar": 8 for i in range(5)}))
    memory = fsspec.filesystem("memory")
    local = take(loader({"train": folder, "window_shards": 2}), 6)
    with serve(folder) as server:
        if protocol == "memory":
            for path in folder.iterdir():
                if kind == "sizes" or path.name != "sizes.json":
                    memory.pipe(f"/{tmp_path.name}-{kind}/{path.name}", path.read_bytes())
            base = f"memory://{tmp_path.name}-{kind}"
        else:
            base = server.url
            if kind != "sizes":
                (folder / "sizes.json").unlink()
        spec = base if kind == "manifest" else f"{base}/{{00000..00004}}.tar"
        remote = {"cache_dir": tmp_path / "cache", "backoff_sec": 0.01, "timeout_sec": 5.0}
        section = {"sources": [{"name": "far", "shards": spec}], "window_shards": 2, "remote": remote}
        far = loader(section)
        found = take(far, 6)
        assert keys(found) == keys(local)
        assert all((a.image == b.image).all() for a, b in zip(found, local, strict=True))
        assert far.order_name == loader({"train": folder, "window_shards": 2}).order_name
    shutil.rmtree(tmp_path / "cache")


def test_a_remote_manifest_that_is_none_is_named(tmp_path: Path, cache: ShardCache) -> None:
    (tmp_path / "manifest.json").write_text('{"format": "other"}')
    with serve(tmp_path) as server:
        with pytest.raises(DataError, match="not of format"):
            open_(server.url, cache)
        with pytest.raises(DataError, match=r"manifest.json cannot be fetched: missing-shard: HTTP 404"):
            open_(f"{server.url}/nowhere", cache)


def test_names_in_messages_hold_no_credentials() -> None:
    assert display_url("https://me:secret@host/a.tar?X-Signature=abc") == "https://host/a.tar"
    assert display_url("/data/a.tar") == "/data/a.tar"


def huge_manifest(folder: Path) -> Path:
    """A list of 200,000 tars with 2e9 samples, none of which is there."""
    folder.mkdir()
    shards = [
        {
            "file": f"{i:06d}.tar",
            "index": f"{i:06d}.index.json",
            "num_samples": 10_000 - 13 * (i % 7 == 0),
            "bytes": 900_000_000 + i,
            "sha256": f"{i:064x}",
        }
        for i in range(200_000)
    ]
    manifest = {"format": FORMAT, "num_samples": 0, "decoded_bytes": 10**15, "shards": shards}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return folder


def test_opening_a_manifest_of_two_billion_samples_and_seeking_takes_a_moment(
    tmp_path: Path, cache: ShardCache
) -> None:
    folder = huge_manifest(tmp_path / "set")
    seconds = []
    for _ in range(3):  # the least disturbed one counts
        start = time.process_time()
        found = open_shard_list("s", str(folder), cache=cache, patience=Patience(), max_bad_fraction=1.0)
        order = ShuffledOrder(0, found.counts, window=16, streams=8)
        samples = order(5_000_000_000 + np.arange(512))
        found.digest()
        seconds.append(time.process_time() - start)
    assert found.num_samples > 1.99e9
    assert len(set(samples.tolist())) == 512
    # About 0.5 s on a fast core and 1.4 s on a slow one; what grew with the samples would take hours.
    assert min(seconds) < 10.0


def test_a_long_list_of_tars_is_looked_at_here_and_there(
    tmp_path: Path, cache: ShardCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_prepared(tmp_path / "set", 60, 1)
    for path in list(folder.glob("*.tar"))[:30]:
        path.unlink()
    monkeypatch.setattr(sources, "MAX_LOOKED_AT", 20)
    monkeypatch.setattr(sources, "MAX_NAMED", 3)
    with pytest.raises(BadDataLimitError, match=r"about \d+ of 60 samples of source 's' are gone"):
        open_shard_list("s", str(folder), cache=cache, patience=Patience(), max_bad_fraction=0.1)
    assert caplog.text.count(".tar: missing") == 3
    assert "more" in caplog.text
