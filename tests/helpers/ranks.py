"""What each process of `run_on_ranks` runs: in a module of its own, since every folder's conftest has the same name."""

from __future__ import annotations

import os
import pickle
import traceback
from multiprocessing.connection import Connection

import torch


def rank_main(pipe: Connection, payload: bytes, env: dict[str, str]) -> None:
    os.environ |= env
    torch.set_num_threads(1)
    from evatool.distributed.world import close_world, init_world

    try:
        fn, args = pickle.loads(payload)
        init_world("cpu", timeout_sec=60)
        pipe.send_bytes(pickle.dumps((True, fn(*args))))  # plain pickle: tensors travel as bytes
        close_world()
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
        raise
