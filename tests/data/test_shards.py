from __future__ import annotations

import hashlib
import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest
import webdataset
from sample_pictures import image

from evatool.core.errors import DataError
from evatool.data.tar.index import read_index
from evatool.data.tar.manifest import ShardIndex
from evatool.data.tar.reader import TarReader
from evatool.data.tar.writer import Sample, ShardWriter

ONE_SAMPLE = {
    "keys": ["a"],
    "starts": [0, 1],
    "extensions": ["txt"],
    "extension_ids": [0],
    "offsets": [512],
    "sizes": [1],
    "crc32": [-1],
    "problems": [],
}


def samples(n: int) -> list[Sample]:
    return [
        Sample(f"k{i:03d}", "png", image(seed=i), {"txt": f"caption {i} é".encode(), "json": b'{"n": 1}'}, 2304)
        for i in range(n)
    ]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "set", samples_per_shard=4) as writer:
        for sample in samples(10):
            writer.write(sample)
        writer.finish(max_pixels=1000, colour="blue")
    return tmp_path / "set"


@pytest.mark.parity
def test_webdataset_reads_the_same_samples(written: Path) -> None:
    urls = [str(path) for path in sorted(written.glob("*.tar"))]
    assert len(urls) == 3
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    index = ShardIndex(written)
    assert [sample["__key__"] for sample in read] == index.keys == [s.key for s in samples(10)]
    for i, (theirs, ours) in enumerate(zip(read, samples(10), strict=True)):
        expected = {ours.extension: ours.image, **ours.members}
        assert {k: v for k, v in theirs.items() if not k.startswith("__")} == expected
        assert index.read(i) == expected
        assert index.read(i, ["txt", "cls"]) == {"txt": ours.members["txt"]}


def test_manifest_says_what_is_there(written: Path) -> None:
    manifest = json.loads((written / "manifest.json").read_text())
    assert (manifest["num_samples"], manifest["decoded_bytes"], manifest["colour"]) == (10, 23040, "blue")
    assert [shard["num_samples"] for shard in manifest["shards"]] == [4, 4, 2]
    for shard in manifest["shards"]:
        data = (written / shard["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
    assert manifest["num_bytes"] == sum(path.stat().st_size for path in written.glob("*.tar"))


def test_equal_samples_make_equal_bytes(written: Path, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "again", samples_per_shard=4) as writer:
        for sample in samples(10):
            writer.write(sample)
        writer.finish(max_pixels=1000, colour="blue")
    for path in written.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_an_exception_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, samples_per_shard=4) as writer:  # noqa: PT012
        for sample in samples(6):
            writer.write(sample)
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.index.json", "00000.tar"]
    with pytest.raises(DataError, match="it is not finished"):
        ShardIndex(tmp_path)


def test_a_lost_index_is_rebuilt_from_the_tar(written: Path) -> None:
    before = ShardIndex(written).read(5)
    for path in written.glob("*.index.json"):
        path.unlink()
    assert ShardIndex(written).read(5) == before


@pytest.mark.parametrize(
    "spoiled",
    [
        {"keys": ["a", "b"]},
        {"starts": [0, 2]},
        {"starts": [1, 1]},
        {"extension_ids": [1]},
        {"extension_ids": [-1]},
        {"extensions": [7]},
        {"offsets": ["far"]},
        {"sizes": [1, 2]},
        {"offsets": [512, 512], "sizes": [1, 1], "crc32": [-1, -1], "extension_ids": [0, 0], "starts": [0, 2]},
        {"problems": [["link"]]},
        {"crc32": None},
    ],
    ids=str,
)
def test_an_index_that_does_not_fit_together_is_none(tmp_path: Path, spoiled: dict[str, object]) -> None:
    path = tmp_path / "00000.index.json"
    path.write_text(json.dumps(ONE_SAMPLE))
    assert read_index(path).members(0) == [("txt", (512, 1, -1))]
    path.write_text(json.dumps({**ONE_SAMPLE, **spoiled}))
    with pytest.raises(ValueError, match="is not an index of a tar"):
        read_index(path)


def test_index_survives_a_process_border(written: Path) -> None:
    index = ShardIndex(written)
    first = index.read(0)
    assert pickle.loads(pickle.dumps(index)).read(0) == first


def spoil(folder: Path, how: str) -> None:
    shard = folder / "00001.tar"
    if how == "cut":
        shard.write_bytes(shard.read_bytes()[:-700])
    elif how == "gone":
        shard.unlink()
    elif how == "manifest":
        (folder / "manifest.json").write_text('{"shards": [')
    elif how == "format":
        (folder / "manifest.json").write_text('{"format": "other"}')
    elif how == "empty":
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, "shards": []}))
    else:
        (folder / "00001.index.json").write_text(json.dumps(ONE_SAMPLE))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", r"00001.tar has \d+ bytes instead of \d+"),
        ("gone", "00001.tar is missing"),
        ("manifest", "not a manifest of shards"),
        ("format", "has format 'other'"),
        ("empty", "lists no samples"),
        ("index", "has 1 samples in its index and 4 in the manifest"),
    ],
)
def test_damage_is_named(written: Path, how: str, message: str) -> None:
    spoil(written, how)
    with pytest.raises(DataError, match=message) as caught:
        ShardIndex(written)
    assert str(written) in str(caught.value)


def test_folders_that_hold_no_set(written: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        ShardIndex(tmp_path / "nowhere")
    (tmp_path / "run").mkdir()
    written.rename(tmp_path / "run" / "train")
    with pytest.raises(DataError, match=r"did you mean .*train"):
        ShardIndex(tmp_path / "run")


def test_keys_with_folders_and_other_files(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("x.y")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("x.y/1.seg.png", "x.y/1.txt", "x.y/2.txt"):
            entry = tarfile.TarInfo(name)
            entry.size = len(name)
            tar.addfile(entry, io.BytesIO(name.encode()))
    reader = TarReader([path])
    assert reader.keys == ["x.y/1", "x.y/2"]
    assert reader.read(0) == {"seg.png": b"x.y/1.seg.png", "txt": b"x.y/1.txt"}
    (tmp_path / "b.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(DataError, match=r"b.tar cannot be read as a tar"):
        TarReader([tmp_path / "b.tar"])
