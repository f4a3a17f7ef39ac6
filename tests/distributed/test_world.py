"""One process needs no launcher; a half-set environment is refused with the way to start."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from evatool.core.errors import UsageError
from evatool.distributed import collectives
from evatool.distributed.launcher_env import first_node, read_environment
from evatool.distributed.world import close_world, init_world

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS")


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


SRUN = {
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "123456",
}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07", "MASTER_PORT": "29500"}
DEEPSPEED = TORCHRUN | {"CROSS_RANK": "1", "CROSS_SIZE": "2", "LOCAL_SIZE": "4"}


@pytest.mark.parametrize("env", [TORCHRUN, DEEPSPEED, SRUN], ids=["torchrun", "deepspeed", "srun"])
def test_every_launchers_environment(env):
    env = dict(env)
    job = read_environment(env)
    assert (job.rank, job.world_size, job.local_rank) == (5, 8, 1)
    assert env["MASTER_ADDR"] == "gpu07"
    assert env["RANK"] == "5", "what reads RANK alone finds it"
    assert 20000 <= int(env["MASTER_PORT"]) < 40000


def test_a_process_of_the_batch_script_itself_is_alone():
    """Slurm gives it the job's number of tasks too, but only `srun` gives it a step's."""
    env = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "gpu[07-08]"}
    assert read_environment(env).world_size == 1
    assert "RANK" not in env


def test_torchrun_within_srun_is_torchruns():
    assert read_environment(SRUN | TORCHRUN | {"RANK": "2"}).rank == 2


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[03-05,09],login1", "gpu03"),
        ("gpu7", "gpu7"),
        ("a-1,b[1-2]", "a-1"),
        ("rack[1,4]-ib", "rack1-ib"),
        ("gpu[9]", "gpu9"),
    ],
)
def test_first_node(nodes, first):
    assert first_node(nodes) == first


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (SRUN | {"SLURM_PROCID": "x"}, "SLURM_PROCID = 'x' is not a number"),
        (SRUN | {"SLURM_STEP_NODELIST": ""}, "list of nodes '' cannot be read"),
        (TORCHRUN | {"RANK": "8"}, "RANK is 8, but WORLD_SIZE is 8"),
    ],
    ids=["no number", "no nodes", "rank too large"],
)
def test_broken_launchers(env, message):
    with pytest.raises(UsageError, match=message):
        read_environment(dict(env))
