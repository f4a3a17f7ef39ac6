"""The memory and files that reading holds are bounded, and what it says of a tar is what webdataset reads."""

from __future__ import annotations

import os
import pickle
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_shards import add_member, keys, loader, plain_samples, take, write_prepared, write_tar

from evatool.data.sources import tar_source as reading
from evatool.data.sources.cache import ShardCache
from evatool.data.sources.fetch import Patience
from evatool.data.sources.shard_list import open_shard_list
from evatool.data.sources.tar_source import TarSource
from evatool.data.tar import open_files as open_files_module
from evatool.data.tar.index import group_members, index_json, read_index, scan_file
from evatool.data.tar.scan import TarScan
from evatool.data.train import dataset as steps

FIELDS = frozenset({"png", "txt"})


def open_reader(folder: Path, cache: Path) -> TarSource:
    patience = Patience(1, 1.0, 0.0)
    shard_cache = ShardCache(cache, 10**8, patience)
    shards = open_shard_list("s", f"{folder}/*.tar", cache=shard_cache, patience=patience, max_bad_fraction=0.0)
    return TarSource(shards, shard_cache, patience)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_few_tars_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_prepared(tmp_path / "set", 60, 2)
    monkeypatch.setattr(open_files_module, "MAX_OPEN", 5)
    found, before = open_reader(folder, tmp_path / "cache"), open_files()
    rng = random.Random(0)
    for _ in range(300):
        number = rng.randrange(60)
        assert found.read(number, FIELDS)["txt"] == f"words k{number}".encode()
        assert open_files() - before <= 6
    del found
    assert open_files() <= before


def test_tables_of_tars_have_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_prepared(tmp_path / "set", 200, 10)
    found = open_reader(folder, tmp_path / "cache")
    found.read(0, FIELDS)
    one = found._known[0].members.num_bytes
    monkeypatch.setattr(reading, "TABLE_BYTES", 4 * one + 10)
    for shard in range(20):
        found.read(10 * shard, FIELDS)
        assert sum(held.members.num_bytes for held in found._known.values()) <= 4 * one + 10
    assert len(found._known) == 4


def test_a_table_takes_about_a_hundred_bytes_a_sample() -> None:
    names = [f"{i:09d}.{extension}" for i in range(10_000) for extension in ("jpg", "json", "txt")]
    scan = TarScan(names, [1024 * i for i in range(len(names))], [100] * len(names))
    assert group_members(scan).num_bytes / 10_000 < 130


def test_a_process_remembers_a_bounded_number_of_bad_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = plain_samples(range(64))
    for i, members in enumerate(samples.values()):
        if i % 2:
            members["png"] = b""
    monkeypatch.setattr(steps, "_MAX_REMEMBERED_BAD", 10)
    found = loader({"train": write_tar(tmp_path / "set.tar", samples), "max_bad_fraction": 1.0})
    take(found, 8)
    assert len(found.dataset._bad) == 10
    assert len(found.bad) == 32  # each counted once all the same


def test_a_reader_crosses_to_another_process(tmp_path: Path) -> None:
    found = open_reader(write_prepared(tmp_path / "set", 8, 4), tmp_path / "cache")
    expected = found.read(6, FIELDS)
    assert pickle.loads(pickle.dumps(found)).read(6, FIELDS) == expected


NAMES = st.sampled_from(["a", "b", "a.b", "x/a", "x/b", "x.y/a", "A", "a..b", "é"])
EXTENSIONS = st.sampled_from(["jpg", "JPG", "txt", "seg.png", "json", "cls"])


@pytest.mark.parity
@given(members=st.lists(st.tuples(NAMES, EXTENSIONS), max_size=12))
@settings(max_examples=60, deadline=None)
def test_samples_are_grouped_as_webdataset_does(
    members: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    with tarfile.open(path, "w") as tar:
        for i, (name, extension) in enumerate(members):
            add_member(tar, f"{name}.{extension}", bytes([i]))
    found = scan_file(path)
    ours = [(found.key(n), sorted((e, place.size) for e, place in found.members(n))) for n in range(len(found))]
    path.with_suffix(".json").write_bytes(index_json(found))
    assert np.array_equal(read_index(path.with_suffix(".json")).extents, found.extents)
    has_duplicate = any(len({e for e, _ in sample}) < len(sample) for _, sample in ours)
    try:
        theirs = list(webdataset.WebDataset([str(path)], shardshuffle=False, empty_check=False))
    except ValueError:
        assert has_duplicate  # webdataset refuses the whole tar, we the one sample
        return
    assert not has_duplicate
    expected = [(s["__key__"], sorted((k, len(v)) for k, v in s.items() if not k.startswith("__"))) for s in theirs]
    assert ours == expected


def test_plain_and_prepared_sets_hold_the_same_bytes(tmp_path: Path) -> None:
    folder = write_prepared(tmp_path / "set", 12, 4)
    found = open_reader(folder, tmp_path / "cache")
    read = [found.read(i, FIELDS) for i in range(12)]
    theirs = webdataset.WebDataset([str(path) for path in sorted(folder.glob("*.tar"))], shardshuffle=False)
    assert read == [{"png": s["png"], "txt": s["txt"]} for s in theirs]
    assert sorted(keys(take(loader({"train": folder}, global_batch_size=12), 1))) == [f"k{i:05d}" for i in range(12)]
