"""Stored teacher features: rows that are checked one by one, and draws that do not depend on whether they are there."""

from __future__ import annotations

import multiprocessing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_shards import loader, write_prepared

from evatool.core.batch import Batch
from evatool.core.errors import DataError
from evatool.data.feature_store.fill import missing_batches, num_rows
from evatool.data.feature_store.header import read_store_header
from evatool.data.feature_store.spec import StoreSpec, Views
from evatool.data.feature_store.store import FeatureStore, masked_rows, open_store, unpadded_rows
from evatool.data.train.masking import MaskSpec

COUNTS = [np.array([5, 3])]
PLACES = np.array([[0, 0, 4, 0], [0, 1, 0, 1], [0, 0, 0, 0]])


def spec(path: Path, shape: tuple[int, ...] = (4, 3), **changes: Any) -> StoreSpec:
    return StoreSpec("patches", path, shape, {"teacher": "abc"}, **changes)


def rows(seed: int = 0, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 4, 3, generator=torch.Generator().manual_seed(seed)).half()


def store(path: Path, **facts: Any) -> FeatureStore:
    return open_store(spec(path), COUNTS, {"views": 2, **facts})


# ------------------------------------------------------------------------------------------------------------ rows


def test_what_is_written_is_read(tmp_path: Path) -> None:
    ours = store(tmp_path)
    assert ours.read(PLACES) is None
    ours.write(PLACES[:2], rows()[:2])
    assert ours.read(PLACES) is None  # one of three is missing
    assert ours.read(np.array([[0, 0, 4, 1]])) is None  # nor is it there in another view
    ours.write(PLACES[2:], rows()[2:])
    for reader in (ours, store(tmp_path)):
        assert torch.equal(reader.read(PLACES), rows())
        assert reader.read(PLACES[::-1].copy()).equal(rows().flip(0))
        assert not reader.damaged


@pytest.mark.parametrize("at", [0, 11, 23, -1, -3], ids=["first", "middle", "last", "checksum", "checksum's start"])
def test_a_damaged_row_is_missing_and_named(tmp_path: Path, at: int) -> None:
    ours = store(tmp_path)
    ours.write(PLACES, rows())
    file = tmp_path / "source0" / "shard000000.view0.features"
    data, size = bytearray(file.read_bytes()), ours.spec.row_bytes
    data[4 * size + at % size] ^= 16
    file.write_bytes(data)
    reader = store(tmp_path)
    assert reader.read(PLACES) is None
    assert reader.damaged == [f"{file}, row 4"]
    assert torch.equal(reader.read(PLACES[1:]), rows()[1:])
    reader.write(PLACES[:1], rows()[:1])  # as the teacher's run after it does
    assert torch.equal(reader.read(PLACES), rows())


def test_a_row_that_was_cut_off_is_missing(tmp_path: Path) -> None:
    ours = store(tmp_path)
    ours.write(PLACES, rows())
    file = tmp_path / "source0" / "shard000000.view0.features"
    with file.open("r+b") as opened:
        opened.truncate(4 * ours.spec.row_bytes + 7)
    assert store(tmp_path).read(PLACES) is None
    assert torch.equal(store(tmp_path).read(PLACES[1:]), rows()[1:])


def test_a_row_counts_at_its_own_place_and_in_its_own_store_only(tmp_path: Path) -> None:
    ours = store(tmp_path / "a")
    ours.write(PLACES[:1], rows()[:1])
    name = "source0/shard000000.view{}.features"
    data = (tmp_path / "a" / name.format(0)).read_bytes()
    (tmp_path / "a" / name.format(1)).write_bytes(data)
    assert ours.read(np.array([[0, 0, 4, 1]])) is None
    other = store(tmp_path / "b", seed=1)
    (tmp_path / "b" / "source0").mkdir()
    (tmp_path / "b" / name.format(0)).write_bytes(data)
    assert other.read(PLACES[:1]) is None
    assert len(ours.damaged) == len(other.damaged) == 1


def _write_many(path: Path, first: int) -> None:
    ours = open_store(spec(path), [np.array([64])], {"views": 2})
    for i in range(first, 64, 2):
        ours.write(np.array([[0, 0, i, 0]]), rows(i, 1))


def test_processes_write_side_by_side(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(tmp_path, first)) for first in (0, 1)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    reader = open_store(spec(tmp_path), [np.array([64])], {"views": 2})
    found = reader.read(np.array([[0, 0, i, 0] for i in range(64)]))
    assert torch.equal(found, torch.cat([rows(i, 1) for i in range(64)]))


def test_another_stores_folder_is_refused_with_what_differs(tmp_path: Path) -> None:
    store(tmp_path, seed=3)
    with pytest.raises(DataError) as error:
        open_store(StoreSpec("patches", tmp_path, (4, 3), {"teacher": "xyz"}), COUNTS, {"views": 4, "seed": 3})
    assert "teacher: stored with abc, now xyz" in error.value.what
    assert "views: stored with 2, now 4" in error.value.what
    assert "seed:" not in error.value.what
    assert "teacher.store.path" in str(error.value.fix)
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        store(tmp_path, seed=3)


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written"):
        store(tmp_path / "file" / "store")


def test_numbers_beyond_float16_are_refused(tmp_path: Path) -> None:
    batch = Batch(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), ["a"], store_rows=torch.tensor([[0, 0, 0, 0]]))
    with pytest.raises(DataError, match="7e\\+04"):
        store(tmp_path).keep(batch, torch.full((1, 4, 3), 7e4))


@given(st.integers(1, 4), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_masked_rows_come_back_in_order(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(size, 6, generator=generator) < 0.4
    features = torch.randn(size, 6, 2, generator=generator)
    packed = masked_rows(features, mask, 6)
    assert torch.equal(unpadded_rows(packed, mask), features[mask])
    assert int((packed != 0).any(-1).sum()) == int(mask.sum())


# ---------------------------------------------------------------------------------------------------------- loaders


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prepared(tmp_path_factory.mktemp("shards"), 40, 15)


AUGMENT = {"crop_scale": (0.3, 1.0), "horizontal_flip": 0.5}
MASK = MaskSpec((2, 2), 0.5, 0.25)


def batches(shards: Path, path: Path | None, count: int, views: int | Views = 2, **options: Any) -> list[Batch]:
    stores = () if path is None else (spec(path),)
    drawn = Views(views, 9, stores) if isinstance(views, int) else views
    options = {"mask": MASK, "views": drawn, **options}
    return list(islice(loader({"train": shards, "augment": AUGMENT}, **options), count))


def by_key(found: list[Batch]) -> dict[str, tuple[Any, ...]]:
    return {k: (b.image[i], b.mask[i]) for b in found for i, k in enumerate(b.keys)}  # type: ignore[index]


def same(one: dict[str, Any], two: dict[str, Any]) -> list[bool]:
    return [all(torch.equal(a, b) for a, b in zip(one[key], two[key], strict=True)) for key in one]


def test_views_come_round_and_do_not_depend_on_the_runs_seed(shards: Path) -> None:
    epochs = [by_key(batches(shards, None, 5, global_batch_size=8, position=40 * epoch)) for epoch in range(4)]
    assert all(len(epoch) == 40 for epoch in epochs)
    assert all(same(epochs[0], epochs[2]))
    assert all(same(epochs[1], epochs[3]))
    assert not any(same(epochs[0], epochs[1]))
    other = batches(shards, None, 5, global_batch_size=8, seed=77)
    assert all(same(epochs[0], by_key(other)))
    assert [b.keys for b in other] != [b.keys for b in batches(shards, None, 5, global_batch_size=8)]


def features_of(batch: Batch) -> torch.Tensor:
    """A teacher whose features say which picture they are of."""
    image = batch.image if batch.teacher_image is None else batch.teacher_image
    return image.float().flatten(2)[:, :, :4].transpose(1, 2) / 7


def test_draws_are_the_same_with_and_without_rows(shards: Path, tmp_path: Path) -> None:
    """The student's pictures and masks too; and what is read is what the teacher said, in float16."""
    options = {"global_batch_size": 8, "teacher_image_sizes": [4]}
    loaded = loader({"train": shards, "augment": AUGMENT}, mask=MASK, views=Views(2, 9, (spec(tmp_path),)), **options)
    first = list(islice(loaded, 15))  # an epoch and a half: nothing is there yet
    assert all(b.stored == {} and b.teacher_image is not None for b in first)
    kept = [loaded.stores["patches"].keep(b, features_of(b)) for b in first]
    again = batches(shards, tmp_path, 15, **options)
    for live, stored, rows_of in zip(first, again, kept, strict=True):
        assert torch.equal(live.image, stored.image)
        assert torch.equal(live.mask, stored.mask)
        assert stored.teacher_image is None  # nobody needs it
        assert torch.equal(stored.stored["patches"], rows_of)
        assert torch.equal(stored.stored["patches"], features_of(live).half())
    assert torch.equal(again[3].rows(slice(2, 5)).stored["patches"], kept[3][2:5])
    workers = batches(shards, tmp_path, 5, **options)
    spread = list(islice(loader({"train": shards, "augment": AUGMENT, "num_workers": 2}, mask=MASK,
                                views=Views(2, 9, (spec(tmp_path),)), **options), 5))  # fmt: skip
    assert all(torch.equal(a.stored["patches"], b.stored["patches"]) for a, b in zip(workers, spread, strict=True))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_pass_ahead_of_time_fills_all_and_once(shards: Path, tmp_path: Path, world_size: int) -> None:
    section = {"train": shards, "augment": AUGMENT, "sampling": "with-replacement"}  # as it may be: the pass is not

    def opened(rank: int) -> Any:
        views = Views(3, 9, (spec(tmp_path),))
        return loader(section, views=views, mask=MASK, rank=rank, world_size=world_size, global_batch_size=16)

    made = 0
    for rank in range(world_size):
        ours = opened(rank)
        assert num_rows(ours) == 120
        found = list(missing_batches(ours))
        assert len(found) == 8
        for batch in found:
            made += len(batch.keys)
            ours.stores["patches"].keep(batch, features_of(batch))
    assert made == 128  # the last batch is filled up
    assert all(not b.keys for rank in range(world_size) for b in missing_batches(opened(rank)))
    trained = list(islice(opened(0), 10))
    assert all(b.stored["patches"] is not None for b in trained)
    assert all(torch.equal(b.stored["patches"], features_of(b).half()) for b in trained)


def test_what_a_teacher_sees_is_part_of_the_store(shards: Path, tmp_path: Path) -> None:
    batches(shards, tmp_path, 1)
    header = read_store_header(tmp_path)
    assert header is not None
    assert header["row_shape"] == [4, 3]
    for changes, key in (
        ({"views": Views(2, 8, (spec(tmp_path),))}, "seed: stored with 9, now 8"),
        ({"teacher_image_sizes": [12]}, "teacher.picture: stored with 8, now 12"),
    ):
        with pytest.raises(DataError, match=key):
            batches(shards, tmp_path, 1, **changes)
    section = {"train": shards, "augment": AUGMENT | {"horizontal_flip": 0.1}}
    with pytest.raises(DataError, match=r"data.augment.horizontal_flip: stored with 0.5, now 0.1"):
        loader(section, mask=MASK, views=Views(2, 9, (spec(tmp_path),)))
    # A mask only chooses among rows that hold all patches.
    batches(shards, tmp_path, 1, mask=MaskSpec((2, 2), 0.75, 0.25))
    only = Views(2, 9, (spec(tmp_path / "only", (2, 3), masked_only=True),))
    batches(shards, None, 1, views=only)
    with pytest.raises(DataError, match=r"mask.mask_ratio: stored with 0.5, now 0.75"):
        batches(shards, None, 1, views=only, mask=MaskSpec((2, 2), 0.75, 0.25))
