"""Shards as people really have them: packed on macOS, unsorted, with members of other names, in many sources."""

from __future__ import annotations

import json
import os
import random
import resource
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_pictures import image
from tiny_shards import add_member, keys, loader, plain_samples, take, write_prepared, write_tar

from evatool.core.errors import BadDataLimitError, CheckpointError, RecipeError
from evatool.data.tar import open_files
from evatool.data.tar.index import index_json, read_index, read_index_head, scan_file
from evatool.data.train.drift import read_counts, write_counts

APPLE_DOUBLE = b"\x00\x05\x16\x07" + bytes(160)


def packed(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            add_member(tar, name, data)
    return path


def pairs(count: int, folder: str = "") -> list[tuple[str, bytes]]:
    return [
        (f"{folder}{i:05d}.{extension}", data)
        for i in range(count)
        for extension, data in (("png", image(seed=i % 50)), ("txt", f"words {i}".encode()))
    ]


def webdatasets_own(path: Path) -> list[tuple[str, list[str]]]:
    """Key and extensions of each sample, as webdataset's reader finds them."""
    read = webdataset.WebDataset([str(path)], shardshuffle=False, empty_check=False)
    own = {"__key__", "__url__", "__local_path__"}
    return [(s["__key__"], sorted(s.keys() - own)) for s in read]


def ours(path: Path) -> list[tuple[str, list[str]]]:
    found = scan_file(path)
    return [(found.key(n), sorted(name for name, _ in found.members(n))) for n in range(len(found))]


# ------------------------------------------------------------------------------------------------------- grouping


PARTS = st.sampled_from(["a", "b", ".", "_", "__", "/", "é", "jpg", "TXT"])


@pytest.mark.parity
@given(names=st.lists(st.lists(PARTS, min_size=1, max_size=7).map("".join), max_size=10))
@settings(max_examples=25, deadline=None)
def test_any_names_make_the_samples_that_webdataset_makes(names: list[str], tmp_path_factory: Any) -> None:
    # Left out: names that are unsafe or folders, and webdataset's sample `d/` of macOS's `d/._a` (see tar/index.py).
    names = [n for n in names if not n.startswith("/") and ".." not in n.split("/") and not n.endswith("/")]
    names = [n for n in names if not ("/" in n and n.rpartition("/")[2].startswith("."))]
    path = packed(tmp_path_factory.mktemp("names") / "a.tar", [(name, b"x") for name in names])
    found = ours(path)
    if any(len(set(extensions)) < len(extensions) for _, extensions in found):
        with pytest.raises(ValueError, match="duplicate"):
            webdatasets_own(path)
    else:
        assert found == webdatasets_own(path)


@pytest.mark.parametrize("folder", ["", "./", "set/", "./a.b/c/"])
def test_what_macos_adds_to_a_tar_is_passed_over(tmp_path: Path, folder: str, caplog: pytest.LogCaptureFixture) -> None:
    members = [("README", b"read me"), ("LICENSE", b"all rights"), ("__meta__/info.json", b"{}")]
    for name, data in pairs(32, folder):
        head, _, base = name.rpartition("/")
        members += [(f"{head}/._{base}" if head else f"._{base}", APPLE_DOUBLE), (name, data)]
    path = packed(tmp_path / "set.tar", members)
    for _ in range(2):  # scanned, then from the index
        found = loader({"train": path, "max_bad_fraction": 0.0}, global_batch_size=32)
        assert found.num_samples == 32
        assert len(set(keys(take(found, 1)))) == 32
    assert "no-key at byte 512 (README), 67 of this kind" in caplog.text


def test_samples_that_do_not_stand_together_are_named_with_the_way_to_sort_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = pairs(40)
    path = packed(tmp_path / "set.tar", sorted(members, key=lambda member: member[0].rpartition(".")[2]))
    assert ours(path) == webdatasets_own(path)
    with pytest.raises(BadDataLimitError) as caught:
        take(loader({"train": path}), 5)
    message = str(caught.value)
    assert "split-sample" in message
    assert "its members: png; others of this key stand elsewhere in the tar" in message
    assert "tar --sort=name" in message
    assert "split-sample" in caplog.text
    again = packed(tmp_path / "sorted.tar", sorted(members))
    assert len(set(keys(take(loader({"train": again, "max_bad_fraction": 0.0}, global_batch_size=40), 1)))) == 40


def test_two_tars_joined_hold_other_samples_of_the_same_names(tmp_path: Path) -> None:
    path = packed(tmp_path / "set.tar", pairs(8) + pairs(8))
    assert not scan_file(path).split_samples
    found = loader({"train": path, "max_bad_fraction": 0.0})
    assert len(keys(take(found, 1))) == 16


def test_names_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for i in range(16):
            add_member(tar, f"caf\xe9{i}.png", image(seed=i))
            add_member(tar, f"caf\xe9{i}.txt", b"words")
    found = loader({"train": tmp_path / "set.tar", "max_bad_fraction": 0.0})
    assert sorted(keys(take(found, 1))) == sorted(f"caf\\xe9{i}" for i in range(16))


# -------------------------------------------------------------------------------------------------------- members


@pytest.mark.parametrize("name", ["input.png", "Input.PNG", ".input.png"])
def test_the_recipe_names_the_images_member(tmp_path: Path, name: str) -> None:
    members = {"Input.png": b"", "outputs.txt": b"words", "thumbnail.png": b"none"}
    samples = {f"s{i}": {**members, "Input.png": image(seed=i)} for i in range(16)}
    path = write_tar(tmp_path / "set.tar", samples)
    section = {"train": path, "image": name, "caption": [{"member": "Outputs.txt"}], "max_bad_fraction": 0.0}
    assert len(set(keys(take(loader(section), 1)))) == 16
    first = loader({**section, "image": ["photo.webp", "input.png"]})
    assert len(set(keys(take(first, 1)))) == 16


def test_a_sample_without_an_image_is_told_with_all_its_members(tmp_path: Path) -> None:
    samples = {f"s{i}": {"input.jpg": image(), "txt": b"words", "json": b"[]", "cls": b"1"} for i in range(16)}
    with pytest.raises(BadDataLimitError) as caught:
        take(loader({"train": write_tar(tmp_path / "set.tar", samples)}), 1)
    assert "no member jpg or png or webp or jpeg; its members: cls, input.jpg, json, txt" in str(caught.value)
    assert "name the image's member with data.image" in str(caught.value)


def test_a_sample_without_a_caption_is_told_with_all_its_members(tmp_path: Path) -> None:
    samples = {f"s{i}": {"png": image(), "outputs.txt": b"words"} for i in range(16)}
    with pytest.raises(BadDataLimitError, match=r"needs txt; its members: outputs.txt, png"):
        take(loader({"train": write_tar(tmp_path / "set.tar", samples)}), 1)


@pytest.mark.parametrize("fault", ["twice", "other bytes"])
def test_a_json_member_that_nothing_needs_costs_no_sample(tmp_path: Path, fault: str) -> None:
    if fault == "twice":
        members = [(name, data) for pair in zip(*[iter(pairs(16))] * 2, strict=True) for name, data in pair]
        path = packed(tmp_path / "set.tar", [*members[:2], ("00000.json", b"{}"), ("00000.json", b"{}"), *members[2:]])
    else:
        path = write_prepared(tmp_path / "set", 16, 16)
        index = read_index(path / "00000.index.json")
        data = bytearray((path / "00000.tar").read_bytes())
        data[dict(index.members(3))["json"].offset] ^= 1
        (path / "00000.tar").write_bytes(data)
    found = loader({"train": path, "max_bad_fraction": 0.0})
    assert len(set(keys(take(found, 1)))) == 16


def test_a_concept_that_is_no_text_makes_no_error(tmp_path: Path) -> None:
    values = [b'"\\ud800"', b"[" * 90 + b"]" * 90, b"{}", b"1e400", b"null", b'"x"']
    samples = {
        f"s{i}": {"png": image(), "txt": b"words", "json": b'{"concept": ' + value + b"}"}
        for i, value in enumerate(values)
    }
    (batch,) = take(
        loader({"train": write_tar(tmp_path / "set.tar", samples), "max_bad_fraction": 0.0}, global_batch_size=6), 1
    )
    assert len(set(batch.caption_id.tolist())) == 6


# --------------------------------------------------------------------------------------------------------- indexes


@pytest.mark.parametrize("kind", ["plain", "prepared", "prepared before"])
def test_no_flipped_bit_of_an_index_loses_a_sample(tmp_path: Path, kind: str) -> None:
    if kind == "plain":
        path = train = write_tar(tmp_path / "set.tar", plain_samples(range(16)))
        index = tmp_path / "set.tar.index.json"
        loader({"train": path})
    else:
        train = write_prepared(tmp_path / "set", 16, 16)
        index = train / "00000.index.json"
        if kind == "prepared before":  # without version and checksums
            table = json.loads(index.read_bytes())
            for name in ("version", "tar_bytes", "tar_mtime_ns", "num_samples", "body_crc32", "head_crc32"):
                del table[name]
            index.write_text(json.dumps(table, separators=(",", ":")))
    whole = index.read_bytes()
    expected = take(loader({"train": train, "max_bad_fraction": 0.0}), 1)[0]
    rng = random.Random(0)
    for _ in range(8):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        index.write_bytes(damaged)
        found = loader({"train": train, "max_bad_fraction": 0.0})
        (batch,) = take(found, 1)
        assert not found.bad
        if kind != "prepared before":  # whose keys nothing vouches for
            assert batch.keys == expected.keys
        assert np.array_equal(batch.image, expected.image)
        assert np.array_equal(batch.tokens, expected.tokens)


def test_a_damaged_index_is_said_and_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tar(tmp_path / "set.tar", plain_samples(range(16)))
    loader({"train": path})
    index = tmp_path / "set.tar.index.json"
    whole = index.read_bytes()
    assert read_index_head(index) == (path.stat().st_size, path.stat().st_mtime_ns, 16)
    index.write_bytes(whole[:-20] + b"9" + whole[-19:])
    take(loader({"train": path, "max_bad_fraction": 0.0}), 1)
    assert "its index cannot be used, the tar is scanned" in caplog.text
    assert "checksum does not fit" in caplog.text
    assert index.read_bytes() == whole


def test_an_index_of_the_version_before_is_made_again(tmp_path: Path) -> None:
    """Version 1 took a README for a sample."""
    path = packed(tmp_path / "set.tar", [("README", b"text"), *pairs(16)])
    stat = path.stat()
    table = json.loads(index_json(scan_file(path)))
    head = {"tar_bytes": stat.st_size, "tar_mtime_ns": stat.st_mtime_ns, "num_samples": 17}
    index = tmp_path / "set.tar.index.json"
    index.write_text(json.dumps({**head, "keys": ["README", *table["keys"]]}, separators=(",", ":")))
    assert loader({"train": path}).num_samples == 16
    assert read_index_head(index) is not None


# ----------------------------------------------------------------------------------------------- counts of begun runs


def test_a_run_is_told_which_shards_hold_other_samples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [write_tar(tmp_path / f"{shard}.tar", plain_samples(range(8))) for shard in range(3)]
    begun = loader({"train": f"{tmp_path}/*.tar"})
    write_counts(tmp_path, begun.sample_counts)
    before = read_counts(tmp_path)
    begun.check_order(begun.order_name, "here", before=before)
    write_tar(paths[1], plain_samples(range(9)))
    paths[2].unlink()
    found = loader({"train": f"{tmp_path}/*.tar"})
    with pytest.raises(RecipeError) as caught:
        found.check_order(begun.order_name, "here", before=before)
    lines = ["source train: 1.tar had 8 samples and has 9", "source train: 8 samples in 2.tar then, nothing now"]
    assert caught.value.problems == lines
    assert caught.value.exit_code == 2
    assert "--accept-drift data.samples" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"--accept-drift data\.samples"):  # a run that wrote no counts down
        found.check_order(begun.order_name, "here")
    for accepted in ("data.samples", "data"):
        found.check_order(begun.order_name, "here", before=before, accepted=[accepted])
    assert "as accepted: source train: 1.tar had 8" in caplog.text
    for accepted in ("data.sample", "dat", "data.samples.x"):
        with pytest.raises(RecipeError):
            found.check_order(begun.order_name, "here", before=before, accepted=[accepted])


def test_another_order_of_the_same_samples_is_not_accepted_as_other_samples(tmp_path: Path) -> None:
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", plain_samples(range(8)))
    begun = loader({"train": f"{tmp_path}/*.tar"})
    other = loader({"train": f"{tmp_path}/*.tar", "window_shards": 1})
    with pytest.raises(CheckpointError, match="another order"):
        other.check_order(begun.order_name, "here", before=begun.sample_counts, accepted=["data.samples"])


@pytest.mark.parametrize("text", ["", "[]", '{"sources": 1}', '{"sources": {"a": [1]}}', "[" * 5000])
def test_damaged_counts_of_a_run_are_as_good_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "data_samples.json").write_text(text)
    assert read_counts(tmp_path) is None


# ------------------------------------------------------------------------------------------------------ open files


@pytest.fixture
def few_files() -> Iterator[Callable[[int], None]]:
    """Lets a test leave this process only so many more open files than it has."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def limit(more: int) -> None:
        taken = set(map(int, os.listdir("/proc/self/fd")))
        free = [number for number in range(len(taken) + more + 1) if number not in taken]
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[more], before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def four_sources(folder: Path, num_shards: int) -> dict[str, Any]:
    sources = []
    for name in "abcd":
        for shard in range(num_shards):
            write_tar(folder / name / f"{shard:03d}.tar", plain_samples([shard], name))
        sources.append({"name": name, "shards": f"{folder}/{name}/*.tar"})
    return {"sources": sources, "max_bad_fraction": 0.0}


def test_all_sources_of_a_process_share_the_files_that_may_be_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_files, "MAX_OPEN", 10)
    section = four_sources(tmp_path, 8)
    before = len(os.listdir("/proc/self/fd"))
    found = loader(section, global_batch_size=32)
    assert len(set(keys(take(found, 2)))) == 32
    assert len(os.listdir("/proc/self/fd")) - before <= 11
    del found
    assert len(os.listdir("/proc/self/fd")) <= before


def test_where_the_process_may_open_no_more_files_some_are_closed(
    tmp_path: Path, few_files: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    section = four_sources(tmp_path, 8)
    found = loader(section, global_batch_size=32)
    few_files(2)  # a tar and its index; `most_open` counts on more
    assert len(set(keys(take(found, 3)))) == 32
    assert not found.bad
    assert "cannot be used" not in caplog.text  # no index is taken for a damaged one


def test_too_few_files_for_a_single_tar_are_named_with_the_way_to_have_more(
    tmp_path: Path, few_files: Callable[[int], None]
) -> None:
    found = loader({"train": write_tar(tmp_path / "set.tar", plain_samples(range(16)))})
    few_files(0)
    with pytest.raises(BadDataLimitError) as caught:
        take(found, 1)
    assert "too-many-files" in str(caught.value)
    assert "ulimit -n" in str(caught.value)


def test_a_pipe_in_place_of_a_tar_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "set.tar")
    with pytest.raises(BadDataLimitError, match="not a regular file"):
        loader({"train": tmp_path / "set.tar"})


def test_a_thread_reads_on_while_others_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "MAX_OPEN", 1)
    files = open_files.OpenFiles()
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode())
    first = files.acquire("a", lambda: open_files.open_for_reading(tmp_path / "a"))
    files.acquire("b", lambda: open_files.open_for_reading(tmp_path / "b"))
    assert os.pread(first, 1, 0) == b"a"  # being read, so it stays
    files.release("a")
    files.release("b")
    assert files.make_room()
    files.close(["a", "b"])
    assert len(files) == 0
