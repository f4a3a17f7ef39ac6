"""Run a function in several processes that talk over gloo."""

from __future__ import annotations

import multiprocessing
import pickle
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
from ranks import rank_main
from torch.distributed import TCPStore


class Ranks:
    """Processes that run a module's function, each as one rank of a gloo job on this machine."""

    def __init__(self, context: Any, fn: Callable[..., Any], world_size: int, args: tuple[Any, ...]) -> None:
        # The ranks are clients of a store held here, so no port can be taken by someone else in between.
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port), "WORLD_SIZE": str(world_size)}
        job |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        payload = pickle.dumps((fn, args))
        self.processes, self.pipes = [], []
        for rank in range(world_size):
            here, there = context.Pipe()
            env = job | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(target=rank_main, args=(there, payload, env), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)

    def close(self) -> None:
        for process in self.processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()


@pytest.fixture(scope="session")
def start_ranks() -> Callable[..., Ranks]:
    """`start(fn, world_size, *args)`: the processes, to watch or to kill.

    A forkserver with torch preloaded starts a process in a fraction of a second; plain fork hangs once the parent has
    run a backward pass.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "evatool.distributed.engines.build", "evatool.optim.param_groups"])
    return lambda fn, world_size, *args: Ranks(context, fn, world_size, args)


@pytest.fixture(scope="session")
def run_on_ranks(start_ranks: Callable[..., Ranks]) -> Callable[..., list[Any]]:
    """`run(fn, world_size, *args)`: what `fn(*args)`, a module's function, returned on each rank."""

    def run(fn: Callable[..., Any], world_size: int, *args: Any, timeout_sec: float = 120.0) -> list[Any]:
        ranks = start_ranks(fn, world_size, *args)
        deadline = time.monotonic() + timeout_sec
        try:
            answers = [_predict(pipe, rank, deadline) for rank, pipe in enumerate(ranks.pipes)]
        finally:
            ranks.close()
        failures = [f"rank {rank}:\n{value}" for rank, (is_fine, value) in enumerate(answers) if not is_fine]
        assert not failures, "\n".join(failures)
        return [value for _, value in answers]

    return run


def _predict(pipe: Connection, rank: int, deadline: float) -> tuple[bool, Any]:
    if not pipe.poll(max(0.0, deadline - time.monotonic())):
        return False, "no answer in time"
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return False, f"rank {rank} died without an answer"
