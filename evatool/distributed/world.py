"""Who am I among how many: the ranks of a job, read from the launcher's environment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from evatool.core.errors import TransientError, UsageError
from evatool.distributed import meeting, peers
from evatool.distributed.launcher_env import read_environment


@dataclass(frozen=True)
class World:
    """This process among all processes of the job."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and speaks to the user."""
        return self.rank == 0


def init_world(device: str | None = None, timeout_sec: float = 600.0) -> World:
    """Join the job that the environment describes; every rank must call it.

    Started by torchrun, DeepSpeed's launcher or srun (see `environment`); without them this is a job of one process and
    no process group is made. Several processes talk over nccl on GPUs and gloo on CPUs.

    Args:
        device: "cpu" or "cuda"; a GPU where there is one when absent.
        timeout_sec: a collective that waits longer than this fails instead of hanging.
    Raises: UsageError if the environment is incomplete or names more local ranks than there are GPUs; TransientError
        if the other ranks do not come in time.
    """
    job = read_environment()
    world_size, rank, local_rank = job.world_size, job.rank, job.local_rank
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}",
                expected="at most one process a GPU",
                fix="start fewer processes (torchrun --nproc-per-node, or engine.processes in the recipe)",
            )
        torch.cuda.set_device(local_rank)
    where = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    if world_size > 1 and not dist.is_initialized():
        backend = "nccl" if kind == "cuda" else "gloo"
        store = meeting.join(job, timeout_sec)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_sec)
        )
    return World(rank=rank, world_size=world_size, local_rank=local_rank, device=where)


@contextmanager
def joined_world() -> Iterator[World]:
    """`init_world` around a stage, and `close_world` at its end.

    Raises: as `init_world`; TransientError naming a rank that is gone where an exchange fails because of it.
    """
    world = init_world()
    try:
        yield world
    except RuntimeError as error:
        gone = peers.cause_of(error)
        if not gone:
            raise
        raise TransientError(
            "; ".join(gone), where=f"rank {world.rank}: {error}", fix="run the same command with --resume"
        ) from error
    finally:
        close_world()


def close_world() -> None:
    """Leave the job; harmless where no process group was made."""
    meeting.leave()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
