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


@pytest.fixture(scope="session")
def run_on_ranks() -> Callable[..., list[Any]]:
    """`run(fn, world_size, *args)`: what `fn(*args)`, a module's function, returned on each rank.

    A forkserver with torch preloaded starts a process in a fraction of a second; plain fork hangs once the parent has
    run a backward pass.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "evatool.distributed.engine", "evatool.optim.param_groups"])

    def run(fn: Callable[..., Any], world_size: int, *args: Any, timeout_sec: float = 120.0) -> list[Any]:
        # The ranks are clients of a store held here, so no port can be taken by someone else in between.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(world_size)}
        job |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        payload = pickle.dumps((fn, args))
        processes, pipes = [], []
        for rank in range(world_size):
            here, there = context.Pipe()
            env = job | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(target=rank_main, args=(there, payload, env), daemon=True)
            process.start()
            there.close()
            processes.append(process)
            pipes.append(here)
        deadline = time.monotonic() + timeout_sec
        try:
            answers = [_answer(pipe, rank, deadline) for rank, pipe in enumerate(pipes)]
        finally:
            for process in processes:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
        failures = [f"rank {rank}:\n{value}" for rank, (is_fine, value) in enumerate(answers) if not is_fine]
        assert not failures, "\n".join(failures)
        return [value for _, value in answers]

    return run


def _answer(pipe: Connection, rank: int, deadline: float) -> tuple[bool, Any]:
    if not pipe.poll(max(0.0, deadline - time.monotonic())):
        return False, "no answer in time"
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return False, f"rank {rank} died without an answer"
