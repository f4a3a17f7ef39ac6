"""Sources that the package does not know: batches are exact, resumed and mixed as those of tars are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from sample_pictures import image
from tiny_shards import count_letters, keys, loader, take, write_prepared

from evatool.core.batch import Batch
from evatool.core.errors import BadDataLimitError, RecipeError
from evatool.data.sources.base import Fields, SequentialSource, Source, UnreadableSample
from evatool.data.train.loader import TrainLoader

Pair = tuple[bytes, str]


class Pairs(Source):
    """Encoded images and captions in memory; a list with None in an image's place has an unreadable sample there."""

    name = "pairs"

    def __init__(self, pairs: Sequence[tuple[bytes | None, str]]) -> None:
        self.pairs = list(pairs)

    @property
    def num_samples(self) -> int:
        return len(self.pairs)

    def read(self, index: int, fields: Collection[str]) -> Fields:
        encoded, caption = self.pairs[index]
        if encoded is None:
            raise UnreadableSample("no-image", f"pair {index} is empty")
        return {"png": encoded, "txt": caption.encode()}

    def describe(self) -> str:
        return f"{len(self.pairs)} pairs in memory"

    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join(caption for _, caption in self.pairs).encode()).hexdigest()[:16]


class FolderInShards(Source):
    """Image files of a folder, ten to a shard, whose captions are their names."""

    name = "folder"

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*.png"))
        self.prefetched: list[int] = []
        self.can_prefetch = True

    @property
    def num_samples(self) -> int:
        return len(self.files)

    @property
    def shard_counts(self) -> Any:
        counts = [10] * (len(self.files) // 10)
        return torch.tensor([*counts, *([rest] if (rest := len(self.files) % 10) else [])]).numpy()

    def read(self, index: int, fields: Collection[str]) -> Fields:
        return {"png": self.files[index].read_bytes(), "txt": self.files[index].stem.encode()}

    def key(self, index: int) -> str:
        return self.files[index].stem

    def prefetch(self, shards: Sequence[int]) -> None:
        self.prefetched += shards

    def describe(self) -> str:
        return f"{len(self.files)} files"

    def fingerprint(self) -> str:
        return " ".join(path.name for path in self.files)


class Counting(SequentialSource):
    """A stream of numbered images, which notes how often it was opened and how far it was read."""

    name = "stream"

    def __init__(self, num_samples: int, promised: int | None = None) -> None:
        self.length, self.promised = num_samples, num_samples if promised is None else promised
        self.num_opened, self.num_read = 0, 0

    @property
    def num_samples(self) -> int:
        return self.promised

    def open(self) -> Iterator[tuple[str, Fields]]:
        self.num_opened += 1
        for i in range(self.length):
            self.num_read += 1
            yield f"s{i}", {"png": b"" if i == 7 else image(seed=i % 50), "txt": f"words s{i}".encode()}

    def describe(self) -> str:
        return "numbered images"

    def fingerprint(self) -> str:
        return f"numbered {self.length}"


def named(*names: str, **options: Any) -> dict[str, Any]:
    """`[data]` with a source in Python for each name."""
    return {"sources": [{"name": name, "shards": "in Python"} for name in names], **options}


def pairs(count: int = 40) -> Pairs:
    return Pairs([(image(seed=i), f"words p{i}") for i in range(count)])


def assert_equal(ours: Sequence[Batch], theirs: Sequence[Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.keys, a.position) == (b.keys, b.position)
        assert torch.equal(a.image, b.image)
        assert a.tokens is not None
        assert b.tokens is not None
        assert torch.equal(a.tokens, b.tokens)


def test_an_epoch_has_each_pair_once() -> None:
    found = loader(named("pairs"), sources=[pairs()], global_batch_size=8)
    assert found.num_samples == 40
    batches = take(found, 10)
    epochs = [keys(batches[:5]), keys(batches[5:])]
    for epoch in epochs:
        assert sorted(epoch) == sorted(f"pairs-{i}" for i in range(40))
    assert epochs[0] != epochs[1]
    for batch in batches:  # each image stands beside its own caption
        expected = count_letters([f"words p{key.removeprefix('pairs-')}" for key in batch.keys])
        assert torch.equal(batch.tokens, expected)  # type: ignore[arg-type]


def test_a_batch_depends_on_seed_and_position_alone() -> None:
    augment = {"crop_scale": [0.5, 1.0], "horizontal_flip": 0.5}
    batches = take(loader(named("pairs", augment=augment), sources=[pairs()], global_batch_size=12), 9)
    for first in (4, 1, 7):
        resumed = loader(named("pairs", augment=augment), sources=[pairs()], global_batch_size=12, position=12 * first)
        assert_equal(take(resumed, 2), batches[first : first + 2])
    other = take(loader(named("pairs", augment=augment), sources=[pairs()], global_batch_size=12, seed=6), 1)
    assert other[0].keys != batches[0].keys


@pytest.mark.parametrize("make", [lambda: pairs(), lambda: Counting(40)], ids=["by number", "in order"])
def test_workers_and_ranks_change_nothing(make: Any) -> None:
    name = make().name

    def build(**options: Any) -> TrainLoader:
        workers = options.pop("num_workers", 0)
        return loader(named(name, num_workers=workers, max_bad_fraction=0.1), sources=[make()], **options)

    alone = take(build(), 5)
    assert_equal(take(build(num_workers=2), 5), alone)
    ranks = [take(build(rank=rank, world_size=2), 5) for rank in range(2)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert whole.keys[0::2] == parts[0].keys
        assert whole.keys[1::2] == parts[1].keys
        assert torch.equal(whole.image[1::2], parts[1].image)


def test_pairs_are_mixed_with_tars(tmp_path: Path) -> None:
    folder = write_prepared(tmp_path / "set", 60, 20)
    section: dict[str, Any] = named("pairs")
    section["sources"][0]["weight"] = 1.0
    section["sources"].append({"name": "tars", "shards": str(folder), "weight": 3.0})

    def build(**options: Any) -> TrainLoader:
        return loader(section, sources=[pairs()], global_batch_size=32, **options)

    batches = take(build(), 32)
    found = keys(batches)
    assert found.count("pairs-3") in (6, 7)  # 256 of 1024 places for 40 pairs
    assert sum(key.startswith("pairs-") for key in found) == 256
    assert_equal(take(build(position=32 * 20), 3), batches[20:23])
    section["mixing"] = "alternating"
    section["sources"][0]["weight"] = section["sources"][1]["weight"] = 1.0
    turns = [{key.partition("-")[0][:1] for key in batch.keys} for batch in take(build(), 4)]
    assert turns == [{"p"}, {"k"}, {"p"}, {"k"}]


def test_windows_and_prefetching_follow_the_shards_of_a_source(tmp_path: Path) -> None:
    for i in range(45):
        tmp_path.joinpath(f"{i:03d}.png").write_bytes(image(seed=i))
    source = FolderInShards(tmp_path)
    batches = take(loader(named("folder", window_shards=2), sources=[source], global_batch_size=5), 4)
    assert len({int(key) // 10 for key in keys(batches)}) <= 3  # 20 samples of a window of two shards, or of its rest
    assert source.prefetched[:2] != []
    assert set(source.prefetched) <= set(range(5))


def test_an_unreadable_sample_is_replaced_and_counted() -> None:
    items: list[tuple[bytes | None, str]] = list(pairs().pairs)
    items[5] = (None, "words nothing")
    section = named("pairs", max_bad_fraction=0.1)
    found = loader(section, sources=[Pairs(items)], global_batch_size=8)
    batches = take(found, 10)
    assert "pairs-5" not in keys(batches)
    assert found.bad.causes == {"no-image": 1}
    assert_equal(take(loader(section, sources=[Pairs(items)], global_batch_size=8, position=32), 6), batches[4:])
    with pytest.raises(BadDataLimitError, match="1 no-image"):
        take(loader(named("pairs", max_bad_fraction=0.0), sources=[Pairs(items)], global_batch_size=8), 10)


def test_a_stream_is_read_in_its_order_and_resumed_by_skipping() -> None:
    def build(source: Counting, **options: Any) -> TrainLoader:
        return loader(named("stream", max_bad_fraction=0.1), sources=[source], global_batch_size=50, **options)

    source = Counting(150)
    batches = take(build(source), 6)
    expected = [f"s{6 if i == 7 else i}" for i in range(150)]  # the broken one is replaced by the one before it
    assert keys(batches) == [*expected, *expected]
    assert (source.num_opened, source.num_read) == (2, 300)
    resumed = Counting(150)
    assert_equal(take(build(resumed, position=100), 3), batches[2:5])
    assert (resumed.num_opened, resumed.num_read) == (2, 250)


def test_a_stream_that_ends_early_has_unreadable_samples() -> None:
    section = named("stream", max_bad_fraction=0.0)
    with pytest.raises(BadDataLimitError, match="stream-ended"):
        take(loader(section, sources=[Counting(6, promised=40)], global_batch_size=8), 1)


def test_the_order_of_another_source_is_refused() -> None:
    name = loader(named("pairs"), sources=[pairs()]).order_name
    assert loader(named("pairs"), sources=[pairs()]).order_name == name
    assert loader(named("pairs"), sources=[pairs(41)]).order_name != name
    assert loader(named("stream"), sources=[Counting(40)]).order_name != name


def test_a_source_must_be_listed() -> None:
    with pytest.raises(RecipeError, match=r"called pairs[\s\S]*expected: different names out of those.*: others"):
        loader(named("others"), sources=[pairs()])
    with pytest.raises(RecipeError, match="called pairs, pairs"):
        loader(named("pairs"), sources=[pairs(), pairs()])


def test_data_train_is_a_source_called_train() -> None:
    source = pairs()
    source.name = "train"  # type: ignore[misc]
    assert keys(take(loader({"train": "in Python"}, sources=[source]), 1))[0].startswith("train-")
    assert json.loads(json.dumps(loader({"train": "in Python"}, sources=[source]).num_samples)) == 40
