"""What a run reads: modes, mixing, phases, caption places, arrays beside samples, exact resume."""

from __future__ import annotations

import json
import os
import pickle
import signal
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faulty_server import serve
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_pictures import image
from tiny_shards import keys, loader, plain_samples, take, write_prepared, write_tar

from evatool.core.errors import CheckpointError, RecipeError
from evatool.data.train.sample_decoder import parse_npy, parse_safetensors
from evatool.recipe.schema import TrainDataSection


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two sources of 120 and 50 samples in shards of 10."""
    folder = tmp_path_factory.mktemp("two")
    write_prepared(folder / "a", 120, 10, "a")
    write_prepared(folder / "b", 50, 10, "b")
    return [{"name": "a", "shards": str(folder / "a")}, {"name": "b", "shards": str(folder / "b")}]


# ------------------------------------------------------------------------------------------------------- modes


@given(
    world_size=st.sampled_from([1, 2, 3, 4, 6]),
    window=st.integers(1, 12),
    streams=st.integers(1, 6),
    batch=st.sampled_from([12, 24, 36]),
    sampling=st.sampled_from(["epochs", "with-replacement"]),
)
@settings(max_examples=10, deadline=None)
def test_every_world_size_reads_the_same_samples(
    two: list[dict[str, Any]], world_size: int, window: int, streams: int, batch: int, sampling: str
) -> None:
    section = {"sources": two[:1], "window_shards": window, "streams": streams, "sampling": sampling}
    num_steps = -(-240 // batch)
    options = {"global_batch_size": batch, "with_text": False}
    ranks = [take(loader(section, rank=r, world_size=world_size, **options), num_steps + 1) for r in range(world_size)]
    assert len({tuple(b.position for b in rank) for rank in ranks}) == 1  # no rank is a batch ahead
    read = [
        [key for per_rank in zip(*(rank[step].keys for rank in ranks), strict=True) for key in per_rank]
        for step in range(num_steps)
    ]
    assert read == [b.keys for b in take(loader(section, **options), num_steps)]
    if sampling == "epochs":
        flat = [key for step in read for key in step]
        assert [len(set(flat[e * 120 : (e + 1) * 120])) for e in range(2)] == [120, 120]


@pytest.mark.parametrize("num_workers", [1, 4])
def test_windows_of_remote_shards_are_the_same_with_any_number_of_workers(
    two: list[dict[str, Any]], num_workers: int
) -> None:
    section = {"sources": two, "window_shards": 3, "sampling": "epochs"}
    alone, several = loader(section), loader({**section, "num_workers": num_workers})
    for a, b in zip(take(alone, 12), take(several, 12), strict=True):
        assert a.keys == b.keys
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.tokens, b.tokens)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_pass_reads_each_sample_once_and_masks_the_rest(two: list[dict[str, Any]], world_size: int) -> None:
    section = {"sources": two[1:]}
    options = {"global_batch_size": 16, "one_pass": True, "with_text": False, "world_size": world_size}
    ranks = [list(loader(section, rank=r, **options)) for r in range(world_size)]
    assert [len(rank) for rank in ranks] == [4] * world_size  # 50 samples: every rank has as many batches
    valid = [
        key for rank in ranks for b in rank for key, is_valid in zip(b.keys, b.valid.tolist(), strict=True) if is_valid
    ]
    assert sorted(valid) == [f"b{i:05d}" for i in range(50)]


def test_in_training_the_last_batch_is_filled_from_the_next_epoch(two: list[dict[str, Any]]) -> None:
    read = keys(take(loader({"sources": two[1:]}), 7))
    assert len(read) == 112
    assert len(set(read[:50])) == len(set(read[50:100])) == 50
    assert all(b.valid is None for b in take(loader({"sources": two[1:]}), 1))


def test_with_replacement_draws_some_twice(two: list[dict[str, Any]]) -> None:
    read = keys(take(loader({"sources": two[:1], "sampling": "with-replacement"}), 15))
    assert len(read) == 240
    assert abs(len(set(read[:120])) - 120 * (1 - np.exp(-1))) < 15  # 76 expected, standard deviation 3.4
    assert max(Counter(read).values()) > 2


# ------------------------------------------------------------------------------------------------------ mixing


def shares(batches: list[list[str]]) -> list[float]:
    return [sum(key.startswith("b") for key in batch) / len(batch) for batch in batches]


def test_sources_are_mixed_sample_by_sample_in_their_ratio(two: list[dict[str, Any]]) -> None:
    weighted = [{**two[0], "weight": 4.0}, {**two[1], "weight": 1.0}]
    batches = [b.keys for b in take(loader({"sources": weighted}, global_batch_size=64), 32)]
    assert abs(np.mean(shares(batches)) - 0.2) < 0.001  # 2,048 positions: two blocks
    assert all(0 < share < 0.5 for share in shares(batches))
    own = [key for batch in batches for key in batch if key.startswith("b")]
    assert len(set(own[:50])) == 50  # each source goes through its own epochs
    by_size = take(loader({"sources": two}, global_batch_size=64), 16)
    assert abs(np.mean(shares([b.keys for b in by_size])) - 50 / 170) < 0.001


@pytest.mark.parametrize("mode", ["alternating", "weighted-batches"])
def test_eva_takes_whole_batches(two: list[dict[str, Any]], mode: str) -> None:
    found = loader({"sources": two, "mixing": mode})
    batches = [b.keys for b in take(found, 40)]
    assert set(shares(batches)) == {0.0, 1.0}
    if mode == "alternating":
        assert shares(batches) == [0.0, 1.0] * 20
    for r in range(2):
        other = take(loader({"sources": two, "mixing": mode}, rank=r, world_size=2), 40)
        assert [b.keys for b in other] == [batch[r::2] for batch in batches]
    with pytest.raises(RecipeError, match="position 8 is inside a batch"):
        take(loader({"sources": two, "mixing": mode}, position=8), 1)


def test_weights_change_at_stated_samples_seen(two: list[dict[str, Any]]) -> None:
    phases = [{"from_samples": 160, "weights": {"a": 1.0}}, {"from_samples": 320, "weights": {"a": 0.0, "b": 2.0}}]
    section = {"sources": two, "phases": phases}
    batches = take(loader(section), 30)
    by_batch = shares([b.keys for b in batches])
    assert all(share > 0 for share in by_batch[:5])
    assert by_batch[10:20] == [0.0] * 10
    assert by_batch[20:] == [1.0] * 10
    own = [key for key in keys(batches) if key.startswith("a")]
    assert len(set(own[:120])) == 120  # the source goes on where it was
    resumed = take(loader(section, position=304), 11)
    assert [b.keys for b in resumed] == [b.keys for b in batches[19:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": "x"}, "either train"),
        ({"sources": None}, "either train"),
        ({"sources": None, "train": "s3://bucket/x"}, "looks like a URL"),
        ({"mixing": "alternating", "sources": [{"name": "a", "shards": "x"}]}, "has no effect with one source"),
        ({"phases": [{"from_samples": 5, "weights": {"c": 1.0}}]}, "c, which is no source; sources: a, b"),
        ({"phases": [{"from_samples": 5, "weights": {"a": 0.0}}]}, "reads nothing"),
        (
            {"phases": [{"from_samples": n, "weights": {"a": 1.0}} for n in (9, 5)]},
            "each must begin after the one before",
        ),
        ({"extras": [{"name": "t", "member": "t.pkl", "shape": [2]}]}, "must end in npy or safetensors"),
        ({"extras": [{"name": "t", "member": "t.npy", "tensor": "x", "shape": [2]}]}, "belongs to safetensors"),
        ({"caption": [{"member": "json"}]}, "a json member needs `field`"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    section = {"sources": [{"name": "a", "shards": "x"}, {"name": "b", "shards": "y"}], **change}
    section = {key: value for key, value in section.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        TrainDataSection.model_validate_json(json.dumps(section), strict=True)


# -------------------------------------------------------------------------------------------- captions and arrays


def captioned(tmp_path: Path) -> Path:
    samples = plain_samples(range(64))
    for i, (key, members) in enumerate(samples.items()):
        info = {"caption": f"json {key}", "synthetic": [f"first {key}", f"second {key}"] if i % 2 else []}
        members["json"] = json.dumps(info).encode()
        members["blip.txt"] = f"blip {key}".encode()
    return write_tar(tmp_path / "set.tar", samples)


def drawn_words(section: dict[str, Any], steps: int) -> Counter[str]:
    words: list[str] = []

    def remember(captions: list[str]) -> torch.Tensor:
        words.extend(caption.split()[0] for caption in captions)
        return torch.zeros(len(captions), 8, dtype=torch.int64)

    found = loader(section, tokenizer=remember, global_batch_size=64)
    found.dataset.tokens = remember  # every draw, not only the captions that are new
    take(found, steps)
    return Counter(words)


def test_captions_come_from_several_places_by_probability(tmp_path: Path) -> None:
    extents = [
        {"member": "txt", "probability": 0.5},
        {"member": "json", "field": "caption", "probability": 0.25},
        {"member": "blip.txt", "probability": 0.25},
    ]
    found = drawn_words({"train": captioned(tmp_path), "caption": extents}, 50)
    expected = {"words": 0.5, "json": 0.25, "blip": 0.25}
    assert all(abs(found[word] / 3200 - share) < 0.04 for word, share in expected.items())  # standard error 0.009
    # A sample without one place draws from the others, in their ratio.
    extents = [{"member": "json", "field": "synthetic", "probability": 3.0}, {"member": "txt"}]
    found = drawn_words({"train": captioned(tmp_path), "caption": extents}, 50)
    assert abs(found["words"] / 3200 - (0.5 + 0.125)) < 0.04
    assert abs(found["first"] / found["second"] - 1) < 0.2


def npy(array: np.ndarray) -> bytes:
    import io

    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def safetensors(**tensors: np.ndarray) -> bytes:
    from safetensors.numpy import save

    return save(tensors)


def test_arrays_beside_samples_come_with_the_batch(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    features = {key: rng.normal(size=(3, 4)).astype(np.float16) for key in plain_samples(range(32))}
    texts = {key: rng.normal(size=5).astype(np.float32) for key in features}
    samples = plain_samples(range(32))
    for key, members in samples.items():
        members["teacher.npy"] = npy(features[key])
        members["text.safetensors"] = safetensors(emb=texts[key], other=np.zeros(2, np.float32))
        members["secret.pkl"] = pickle.dumps({"a": 1})
    extras = [
        {"name": "teacher", "member": "teacher.npy", "shape": [3, 4]},
        {"name": "text", "member": "text.safetensors", "tensor": "emb", "shape": [5]},
    ]
    found = loader({"train": write_tar(tmp_path / "set.tar", samples), "extras": extras})
    for batch in take(found, 2):
        assert batch.extras["teacher"].dtype == torch.float16
        assert torch.equal(batch.extras["teacher"], torch.from_numpy(np.stack([features[k] for k in batch.keys])))
        assert torch.equal(batch.extras["text"], torch.from_numpy(np.stack([texts[k] for k in batch.keys])))
        half = batch.rows(slice(0, 8))
        assert torch.equal(half.extras["text"], batch.extras["text"][:8])
    assert take(loader({"train": tmp_path / "set.tar"}), 1)[0].extras is None


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("/tmp/evatool-trap-was-sprung",))


def bad_arrays() -> dict[str, bytes]:
    good = npy(np.zeros((3, 4), np.float32))
    objects = npy(np.array([Trap()] * 12, dtype=object).reshape(3, 4))
    header = struct.pack("<H", 30) + b"{'descr': __import__('os')}   \n"
    return {
        "objects": objects,
        "code-in-header": b"\x93NUMPY\x01\x00" + header,
        "cut": good[:-1],
        "cut-header": good[:20],
        "empty": b"",
        "int": npy(np.zeros((3, 4), np.int32)),
        "fortran": npy(np.asfortranarray(np.zeros((3, 4), np.float32))),
        "other-shape": npy(np.zeros((4, 3), np.float32)),
        "nan": npy(np.full((3, 4), np.nan, np.float32)),
        "huge-shape": good.replace(b"(3, 4)", b"(3, 9999999999)"),
        "long-header": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"x",
        "nested": b"\x93NUMPY\x01\x00" + struct.pack("<H", 60_000) + b"(" * 60_000,
    }


@pytest.mark.parametrize("name", list(bad_arrays()))
def test_a_bad_array_makes_a_bad_sample_and_runs_nothing(tmp_path: Path, name: str) -> None:
    samples = plain_samples(range(32))
    for members in samples.values():
        members["t.npy"] = npy(np.ones((3, 4), np.float32))
    samples["k00007"]["t.npy"] = bad_arrays()[name]
    extras = [{"name": "t", "member": "t.npy", "shape": [3, 4]}]
    found = loader({"train": write_tar(tmp_path / "set.tar", samples), "extras": extras, "max_bad_fraction": 0.1})
    read = take(found, 4)
    assert "k00007" not in keys(read)
    assert [(bad.key, bad.cause) for bad in found.bad.first] in (
        [("k00007", "bad-array")],
        [("k00007", "array-shape")],
    )
    assert not Path("/tmp/evatool-trap-was-sprung").exists()


@given(data=st.binary(max_size=300), array=st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_an_array_or_a_known_error(data: bytes, array: bool) -> None:
    known = (ValueError, SyntaxError, RecursionError, MemoryError, TypeError, struct.error, KeyError)
    try:
        found = parse_npy(b"\x93NUMPY\x01\x00" + data) if array else parse_safetensors(data, "x")
    except known:
        return
    assert found.dtype in (np.float16, np.float32)


def test_masked_modelling_needs_no_captions(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "set.tar", {f"k{i:03d}": {"jpg": image("JPEG", seed=i)} for i in range(32)})
    found = loader({"train": tar}, with_text=False)
    assert len(keys(take(found, 4))) == 64
    assert not found.bad


# ------------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("num_workers", [0, 1, 4])
@pytest.mark.parametrize("mode", ["samples", pytest.param("weighted-batches", marks=pytest.mark.e2e)])
def test_stopping_anywhere_and_going_on_is_not_stopping(two: list[dict[str, Any]], num_workers: int, mode: str) -> None:
    phases = [{"from_samples": 128, "weights": {"a": 1.0, "b": 3.0}}]
    section = {"sources": two, "mixing": mode, "phases": phases, "window_shards": 2, "num_workers": num_workers}
    whole = take(loader(section), 16)
    for stopped in (1, 8, 15):
        resumed = take(loader(section, position=stopped * 16), 16 - stopped)
        for a, b in zip(resumed, whole[stopped:], strict=True):
            assert a.keys == b.keys
            assert torch.equal(a.image, b.image)
            assert torch.equal(a.tokens, b.tokens)


@given(
    stops=st.lists(st.tuples(st.integers(1, 5), st.sampled_from([1, 2, 4])), min_size=2, max_size=4),
    window=st.integers(1, 5),
)
@settings(max_examples=15, deadline=None)
def test_going_on_at_another_world_size_loses_and_repeats_nothing(
    two: list[dict[str, Any]], stops: list[tuple[int, int]], window: int
) -> None:
    section = {"sources": two[1:], "window_shards": window}
    position, read = 0, []
    for num_steps, world_size in stops:
        ranks = [
            take(loader(section, rank=r, world_size=world_size, position=position, with_text=False), num_steps)
            for r in range(world_size)
        ]
        read += [key for batches in zip(*ranks, strict=True) for key in keys(batches)]
        position = ranks[0][-1].position
    for epoch in range(len(read) // 50):
        # Ranks side by side are in another order within a batch: compare what is certainly of one epoch.
        inside = read[-(-epoch * 50 // 16) * 16 : (epoch + 1) * 50 // 16 * 16]
        assert len(set(inside)) == len(inside)
    uninterrupted = keys(take(loader(section, with_text=False), position // 16))
    for start in range(0, position, 16):
        assert sorted(read[start : start + 16]) == sorted(uninterrupted[start : start + 16])


READ_ON = """
import sys
from tiny_shards import loader
found = loader({"train": sys.argv[1], "num_workers": 2, "window_shards": 2}, position=int(sys.argv[2]))
for batch in found:
    print(batch.position, int(batch.image.long().sum()), *batch.keys, flush=True)
"""


@pytest.mark.e2e
def test_after_kill_minus_nine_the_rest_is_the_same(two: list[dict[str, Any]]) -> None:
    folder = two[0]["shards"]

    def lines(position: int, count: int) -> list[str]:
        command = [sys.executable, "-c", READ_ON, folder, str(position)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
            found = [process.stdout.readline() for _ in range(count)]
            os.killpg(process.pid, signal.SIGKILL)
        return found

    first = lines(0, 3)
    last = int(first[-1].split()[0])
    whole = [
        f"{b.position} {int(b.image.long().sum())} {' '.join(b.keys)}\n"
        for b in take(loader({"train": folder, "window_shards": 2}), 6)
    ]
    assert first + lines(last, 3) == whole


def test_a_run_does_not_go_on_in_another_order(two: list[dict[str, Any]], tmp_path: Path) -> None:
    begun = loader({"sources": two}).order_name
    loader({"sources": two, "num_workers": 3, "max_bad_fraction": 0.5}).check_order(begun, "here")
    changed = [
        {"sources": two, "window_shards": 2},
        {"sources": two, "streams": 2},
        {"sources": two, "sampling": "with-replacement"},
        {"sources": two, "mixing": "alternating"},
        {"sources": two, "phases": [{"from_samples": 160, "weights": {"a": 1.0}}]},
        {"sources": [{**two[0], "weight": 2.0}, two[1]]},
        {"sources": two[::-1]},
        {"sources": [two[0], {"name": "b", "shards": str(write_prepared(tmp_path / "b", 51, 10, "b"))}]},
    ]
    for section in changed:
        with pytest.raises(CheckpointError, match="begun with samples in another order"):
            loader(section).check_order(begun, "here")
    with pytest.raises(CheckpointError, match="version 1"):
        loader({"sources": two}).check_order("", "here")


def test_shards_can_move_to_another_machine(two: list[dict[str, Any]], tmp_path: Path) -> None:
    section = {"sources": two[:1], "window_shards": 3}
    begun = loader(section)
    with serve(Path(two[0]["shards"])) as server:
        moved = {**section, "sources": [{"name": "a", "shards": server.url}], "remote": {"cache_dir": tmp_path / "c"}}
        loader(moved).check_order(begun.order_name, "here")
        assert keys(take(loader(moved), 3)) == keys(take(begun, 3))
