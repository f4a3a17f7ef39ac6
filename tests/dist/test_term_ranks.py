"""A loss from outside the package is exact on several ranks, in micro-batches, under every kind of engine."""

from __future__ import annotations

import pytest
from length_term import assert_like, steps
from torch import Tensor

pytestmark = pytest.mark.dist

CELLS = [("ddp", 0), ("fsdp2", 0), ("deepspeed", 3)]


def all_cells() -> list[tuple[list[float], dict[str, Tensor]]]:
    return [steps(*cell, num_chunks=3) for cell in CELLS]


def test_two_ranks_in_micro_batches_train_as_one_process(run_on_ranks) -> None:
    expected = steps("single", 0, 1)
    for outcomes in run_on_ranks(all_cells, 2):
        for found in outcomes:
            assert_like(found, expected)
