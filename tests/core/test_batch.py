"""A batch's fields follow it by what their metadata says: moved, pinned, sliced."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import pytest
import torch
from torch import Tensor

from evatool.core.batch import BY_SAMPLE, OF_BATCH, ON_CPU, ON_DEVICE, Batch
from evatool.core.loader import BatchList

B = 4


class Pinnable:
    """Stands for a tensor where there is no GPU to pin memory for."""

    def __init__(self, is_pinned: bool = False) -> None:
        self.is_pinned = is_pinned

    def pin_memory(self) -> Pinnable:
        return Pinnable(is_pinned=True)


@dataclass
class BatchWithDepth(Batch):
    """A batch as somebody else extends it."""

    depth: Tensor | None = field(default=None, metadata=ON_DEVICE)
    flows: dict[str, Tensor] | None = field(default=None, metadata=ON_DEVICE)
    weights: Tensor | None = field(default=None, metadata=ON_CPU)
    captions: list[str] | None = field(default=None, metadata=BY_SAMPLE)
    title: str = field(default="", metadata=OF_BATCH)


def extended_batch() -> BatchWithDepth:
    return BatchWithDepth(
        torch.zeros(B, 3, 2, 2, dtype=torch.uint8),
        [f"key{i}" for i in range(B)],
        tokens=torch.tensor([[1, 9, 0]] * B),
        depth=torch.arange(B),
        flows={"left": torch.arange(B)},
        weights=torch.arange(B),
        captions=[str(i) for i in range(B)],
        title="first",
    )


def test_a_new_field_is_moved_with_the_batch() -> None:
    there = extended_batch().to("meta")
    assert isinstance(there, BatchWithDepth)
    assert {there.image.device.type, there.depth.device.type, there.flows["left"].device.type} == {"meta"}
    assert {there.weights.device.type, there.text_lengths.device.type} == {"cpu"}, "which the CPU reads"
    assert (there.title, there.captions) == ("first", ["0", "1", "2", "3"])


def test_a_new_field_is_pinned_with_the_batch() -> None:
    stubs: dict[str, Any] = {name: Pinnable() for name in ("image", "depth", "weights")}
    pinned = BatchWithDepth(keys=[], flows={"left": Pinnable()}, **stubs).pin_memory()  # type: ignore[dict-item]
    assert pinned.image.is_pinned
    assert pinned.depth.is_pinned
    assert pinned.flows["left"].is_pinned
    assert not pinned.weights.is_pinned


def test_a_new_field_is_sliced_with_the_batch() -> None:
    part = extended_batch().rows(slice(1, 3))
    assert part.keys == ["key1", "key2"]
    assert part.depth.tolist() == part.weights.tolist() == part.flows["left"].tolist() == [1, 2]
    assert part.captions == ["1", "2"]
    assert part.text_lengths.tolist() == [2, 2]
    assert part.title == "first"


def test_a_field_that_does_not_say_how_it_follows_is_refused() -> None:
    @dataclass
    class Silent(Batch):
        depth: Tensor | None = None

    with pytest.raises(AssertionError, match=r"Silent\.depth has no metadata"):
        Silent(torch.zeros(1), ["a"]).to("cpu")


def test_every_tensor_of_a_batch_follows_it() -> None:
    """All fields but the position are there once for each sample, so slicing leaves none of them behind."""
    unsliced = [f.name for f in fields(Batch) if f.metadata["rows"] is None]
    assert unsliced == ["position"]


def test_a_list_of_batches_is_a_loader() -> None:
    first, second = (Batch(torch.full((B, 1), i), ["a"] * B) for i in range(2))
    loader = BatchList([first, second], global_batch_size=2 * B)
    batches = iter(loader)
    assert [(int(b.image[0]), b.position) for b in (next(batches) for _ in range(3))] == [(0, 8), (1, 16), (0, 24)]
    resumed = BatchList([first, second], global_batch_size=2 * B, position=8)
    assert int(next(iter(resumed)).image[0]) == 1
