"""One process needs no launcher; a half-set environment is refused with the way to start."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from evatool.distributed import collectives
from evatool.distributed.world import close_world, init_world
from evatool.errors import UsageError

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


def test_one_process_needs_no_group():
    world = init_world("cpu")
    assert (world.rank, world.world_size, world.local_rank, world.device) == (0, 1, 0, torch.device("cpu"))
    assert world.is_main
    assert not dist.is_initialized()
    close_world()


def test_exchanges_are_free_in_one_process():
    x = torch.randn(3, 2, requires_grad=True)
    assert collectives.all_gather_with_grad(x) is x
    assert torch.equal(collectives.all_reduce_mean(x), x)
    assert torch.equal(collectives.all_reduce_max(x), x)
    assert not collectives.all_reduce_mean(x).requires_grad
    assert collectives.gather_objects("a") == ["a"]
    assert (collectives.rank(), collectives.world_size()) == (0, 1)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 but RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "h"}, "MASTER_PORT is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two' is not a number"),
    ],
    ids=["no launcher", "no port", "not a number"],
)
def test_half_set_environment(monkeypatch, env, message):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        init_world("cpu")


def test_more_local_ranks_than_gpus(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="local rank 3 has no GPU: this machine has 2") as error:
        init_world("cuda")
    assert "engine.processes" in (error.value.fix or "")
