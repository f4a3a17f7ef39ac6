"""LAMB is one optimiser under every engine, ZeRO stage and world size: fed the same gradients, tensor by tensor."""

from __future__ import annotations

import pytest
from lamb_reference import reference, step_all, worst

pytestmark = pytest.mark.dist

CELLS = [("ddp", 0), ("fsdp2", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]
SLICED = {"granularity": "flat-shard", "virtual_world_size": 3}


def step_cells(cells: list[tuple[str, int]]) -> dict:
    outcomes = {(cell, has_layers): step_all(*cell, has_layers) for cell in cells for has_layers in (False, True)}
    return outcomes | {(cell, "sliced"): step_all(*cell, True, **SLICED) for cell in cells}


@pytest.mark.parametrize(
    ("num_ranks", "cells"),
    [
        pytest.param(1, CELLS[1:], id="1 rank"),
        pytest.param(2, CELLS, id="2 ranks"),
        pytest.param(4, CELLS, id="4 ranks", marks=pytest.mark.slow),
    ],
)
def test_every_tensor_is_the_float64_references(run_on_ranks, num_ranks, cells):
    """Relative L2 per tensor after 50 steps."""
    expected = {False: reference(False), True: reference(True), "sliced": reference(True, 3)}
    for outcomes in run_on_ranks(step_cells, num_ranks, cells, timeout_sec=300):
        for (cell, kind), found in outcomes.items():
            assert worst(found, expected[kind]) <= 1e-6, (cell, kind)


def step_stock(cells: list[tuple[str, int]]) -> list[dict]:
    return [step_all(*cell, True, is_placed=False) for cell in cells]


def test_a_stock_optimiser_fails_and_is_what_flat_shards_imitate(run_on_ranks):
    """The mutation: an optimiser that is not told where its tensors lie, under ZeRO on 2 ranks."""
    (found, *_), _ = run_on_ranks(step_stock, 2, [("deepspeed", 1)])
    assert worst(found, reference(True)) > 1e-2
    assert worst(found, reference(True, 2)) <= 1e-6
    imitated = step_all("single", 0, True, granularity="flat-shard", virtual_world_size=2)
    assert worst(found, {name: tensor.double() for name, tensor in imitated.items()}) <= 1e-6
