from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_pictures import BAD_PICTURES, image

from evatool.core.batch import Batch
from evatool.core.errors import BadDataLimitError, DataError, RecipeError
from evatool.data.tar.manifest import ShardIndex
from evatool.data.tar.writer import Sample, ShardWriter
from evatool.data.tokenizer import build_tokenizer
from evatool.data.train import loader as loading
from evatool.data.train.dataset import caption_id
from evatool.data.train.loader import TrainLoader, build_train_loader
from evatool.data.train.masking import MaskSpec
from evatool.recipe.schema import AugmentSection, TrainDataSection

AUGMENT = AugmentSection(crop_scale=(0.5, 1.0), horizontal_flip=0.5, rotate_degrees=10, color_jitter=0.4, grayscale=0.2)


def build(train: Path, section: dict[str, Any] | None = None, **options: Any) -> TrainLoader:
    options = {
        "image_size": 32,
        "context_length": 16,
        "global_batch_size": 24,
        "rank": 0,
        "world_size": 1,
        "seed": 5,
        "mask": MaskSpec((4, 4), 0.41, 0.0625),
        "teacher_image_sizes": [16],
        **options,
    }
    data = TrainDataSection(**{"train": train, "augment": AUGMENT, "caption": "json-captions", **(section or {})})
    return build_train_loader(data, **options)


def take(loader: TrainLoader, n: int) -> list[Batch]:
    return list(islice(loader, n))


def assert_equal(ours: Sequence[Batch], theirs: Sequence[Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.keys, a.position) == (b.keys, b.position)
        for name in ("image", "tokens", "caption_id", "mask", "teacher_image"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_a_batch_has_what_was_asked_for(small: Path) -> None:
    (batch,) = take(build(small / "train"), 1)
    assert (batch.image.shape, batch.image.dtype) == ((24, 3, 32, 32), torch.uint8)
    assert batch.teacher_image is not None
    assert batch.teacher_image.shape == (24, 3, 16, 16)
    assert batch.tokens is not None
    assert (batch.tokens.shape, batch.tokens.dtype) == ((24, 16), torch.int64)
    assert batch.mask is not None
    assert (batch.mask.shape, batch.mask.dtype) == ((24, 16), torch.bool)
    assert batch.position == 24
    (bare,) = take(build(small / "train", mask=None, teacher_image_sizes=[], with_text=False), 1)
    assert bare.tokens is bare.caption_id is bare.mask is bare.teacher_image is None
    assert bare.keys == batch.keys


def test_resuming_is_not_stopping(small: Path) -> None:
    whole = build(small / "train")
    batches = take(whole, 12)  # more than two epochs of 100 samples
    assert whole.position == 288
    for stopped in (24, 120, 264):
        assert_equal(take(build(small / "train", position=stopped), 12 - stopped // 24), batches[stopped // 24 :])


def test_any_position_can_be_resumed_with_another_batch_size(small: Path) -> None:
    keys = [key for batch in take(build(small / "train"), 6) for key in batch.keys]
    resumed = take(build(small / "train", position=40, global_batch_size=8), 13)
    assert [key for batch in resumed for key in batch.keys] == keys[40:144]


def test_every_epoch_has_every_sample_once(small: Path) -> None:
    n = len(ShardIndex(small / "train"))
    keys = [key for batch in take(build(small / "train"), 3 * n // 24 + 1) for key in batch.keys]
    epochs = [keys[e * n : (e + 1) * n] for e in range(3)]
    assert all(sorted(epoch) == sorted(ShardIndex(small / "train").keys) for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_global_batch(small: Path, world_size: int) -> None:
    whole = take(build(small / "train"), 6)
    ranks = [take(build(small / "train", rank=r, world_size=world_size), 6) for r in range(world_size)]
    for step, batch in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        assert {part.position for part in parts} == {batch.position}
        for r, part in enumerate(parts):
            assert part.keys == batch.keys[r::world_size]
            for name in ("image", "tokens", "caption_id", "mask", "teacher_image"):
                assert torch.equal(getattr(part, name), getattr(batch, name)[r::world_size]), name


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_change_nothing(small: Path, num_workers: int) -> None:
    state = torch.get_rng_state()
    assert_equal(take(build(small / "train", {"num_workers": num_workers}), 8), take(build(small / "train"), 8))
    assert torch.equal(torch.get_rng_state(), state)  # the model's dropout must not feel the loader


def test_decoding_again_or_remembering_is_the_same(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remembered = take(build(small / "train"), 6)
    monkeypatch.setattr(loading, "CACHE_BYTES", 0)
    assert_equal(take(build(small / "train"), 6), remembered)


def test_seeds_and_epochs_differ(small: Path) -> None:
    first, other = take(build(small / "train"), 1)[0], take(build(small / "train", seed=6), 1)[0]
    assert first.keys != other.keys
    n = len(ShardIndex(small / "train"))
    epochs = [take(build(small / "train", position=e * n, global_batch_size=n), 1)[0] for e in (0, 1)]
    place = [dict(zip(batch.keys, range(n), strict=True)) for batch in epochs]
    same = [torch.equal(epochs[0].image[place[0][key]], epochs[1].image[place[1][key]]) for key in place[0]]
    assert not any(same)


def test_captions_are_the_recipes_choice(small: Path) -> None:
    index = ShardIndex(small / "train")
    tokenizer = build_tokenizer(16)
    info = {index.keys[i]: json.loads(index.read(i)["json"]) for i in range(len(index))}
    for batch in take(build(small / "train", {"caption": "txt"}), 3):
        assert torch.equal(batch.tokens, tokenizer([info[key]["label"] for key in batch.keys]))
    drawn = set()
    for batch in take(build(small / "train", {"caption": "json-captions"}), 12):
        for key, row in zip(batch.keys, batch.tokens.tolist(), strict=True):
            rows = tokenizer(info[key]["captions"]).tolist()
            assert row in rows
            drawn.add(rows.index(row))
    assert len(drawn) >= 6  # not always the same one


def test_equal_ids_are_equal_concepts(small: Path) -> None:
    index = ShardIndex(small / "train")
    concept = {index.keys[i]: json.loads(index.read(i)["json"])["concept"] for i in range(len(index))}
    for caption in ("txt", "json-captions"):
        (batch,) = take(build(small / "train", {"caption": caption}, global_batch_size=len(index)), 1)
        same_id = batch.caption_id[:, None] == batch.caption_id[None]
        names = np.array([concept[key] for key in batch.keys])
        assert (same_id.numpy() == (names[:, None] == names[None])).all()


@given(a=st.text(max_size=12), b=st.text(max_size=12))
@settings(max_examples=200, deadline=None)
def test_without_a_concept_equal_words_are_equal_captions(a: str, b: str) -> None:
    same_words = " ".join(a.lower().split()) == " ".join(b.lower().split())
    assert (caption_id(None, a) == caption_id(None, b)) == same_words
    assert caption_id("1f435", a) == caption_id("1f435", b) != caption_id(None, a)
    assert 0 <= caption_id(None, a) < 2**63


# ---------------------------------------------------------------------------------------------------- bad samples


def write_set(folder: Path, num_good: int, bad: dict[str, Sample]) -> Path:
    with ShardWriter(folder, samples_per_shard=16) as writer:
        for i in range(num_good):
            writer.write(Sample(f"good{i:03d}", "png", image(seed=i), {"txt": b"words", "json": b"{}"}, 2304))
        for sample in bad.values():
            writer.write(sample)
        writer.finish(max_pixels=10_000)
    return folder


def bad_sample(name: str) -> Sample:
    members = {"txt": b"words", "json": b'{"captions": ["words"]}'}
    match name:
        case "no-picture":
            return Sample("bad", "cls", b"3", members)
        case "no-caption":
            return Sample("bad", "png", image(), {"json": b"{}"})
        case "bad-utf8":
            return Sample("bad", "png", image(), {**members, "txt": b"caf\xe9"})
        case "bad-json":
            return Sample("bad", "png", image(), {**members, "json": b"[1]"})
        case "too-large":
            return Sample("bad", "png", BAD_PICTURES["20000x20000"], members)
        case _:
            return Sample("bad", "png", BAD_PICTURES["cut-png"], members)


@pytest.mark.parametrize("cause", ["truncated", "too-large", "no-picture", "no-caption", "bad-utf8", "bad-json"])
def test_a_bad_sample_is_replaced_counted_and_named(tmp_path: Path, cause: str, caplog) -> None:
    train = write_set(tmp_path / "set", 99, {"bad": bad_sample(cause)})
    places = [{"member": "txt"}, {"member": "json", "field": "captions"}]  # so that json is needed as well
    options = {"caption": places, "max_bad_fraction": 0.01}
    caplog.set_level("WARNING", logger="evatool")
    loader = build(train, options, global_batch_size=20)
    batches = take(loader, 15)
    assert [bad.cause for bad in loader.bad.first] == [cause]
    assert all(len(set(batch.keys) - {"bad"}) >= 19 and "bad" not in batch.keys for batch in batches)
    # Everything else stays where it was without the bad one: each epoch misses it and has one sample twice at most.
    keys = [key for batch in batches for key in batch.keys]
    assert all(len(set(keys[e * 100 : (e + 1) * 100])) == 99 for e in range(3))
    # The spare is the same on every run, however it is read.
    assert_equal(take(build(train, {**options, "num_workers": 2}, global_batch_size=20), 15), batches)
    assert_equal(take(build(train, options, global_batch_size=20, position=200), 5), batches[10:])


def test_beyond_the_limit_the_run_stops_and_names_shard_and_key(tmp_path: Path) -> None:
    train = write_set(tmp_path / "set", 30, {"bad": bad_sample("truncated")})
    for workers in (0, 2):
        loader = build(train, {"caption": "txt", "max_bad_fraction": 0.01, "num_workers": workers})
        with pytest.raises(BadDataLimitError) as caught:
            take(loader, 10)
        message = str(caught.value)
        assert "1 of 31 samples cannot be read (1 truncated)" in message
        assert "00001.tar bad: truncated" in message
        assert "data.max_bad_fraction = 0.01" in message
        assert caught.value.exit_code == 78


def test_a_set_of_bad_samples_only_stops_at_any_limit(tmp_path: Path) -> None:
    train = write_set(tmp_path / "set", 0, {"bad": bad_sample("truncated")})
    with pytest.raises(BadDataLimitError):
        take(build(train, {"caption": "txt", "max_bad_fraction": 1.0}), 1)


def test_mim_needs_no_captions(tmp_path: Path) -> None:
    bad = {"a": bad_sample("no-caption"), "b": replace(bad_sample("bad-json"), key="worse")}
    train = write_set(tmp_path / "set", 8, bad)
    loader = build(train, with_text=False)
    take(loader, 3)
    assert not loader.bad


def test_wrong_settings_are_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="global_batch_size = 24 does not divide over 5 ranks"):
        build(small / "train", world_size=5)
    with pytest.raises(DataError, match="there is no folder"):
        build(tmp_path / "nowhere")
    with pytest.raises(DataError, match="did you mean"):
        build(small)
