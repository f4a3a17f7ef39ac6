"""The one reader of what a launcher says in the environment. No torch.

`torchrun` and DeepSpeed's launcher set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; `srun` sets names of
its own, which are translated into those here, once, so that everything else reads one kind.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping
from dataclasses import dataclass

from evatool.core.errors import UsageError

_FIRST_PORT, _NUM_PORTS = 20000, 20000


@dataclass(frozen=True)
class JobEnvironment:
    """This process among all processes of the job."""

    rank: int
    world_size: int
    local_rank: int


def read_environment(env: MutableMapping[str, str] = os.environ) -> JobEnvironment:
    """Who this process is, by its launcher; a job of one process where there is none.

    Under `srun`, RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR (the job's first node) and MASTER_PORT (from the job's
    number) are put into `env` where they are not set.
    Raises: UsageError if the environment is incomplete or holds no numbers.
    """
    _adopt_srun(env)
    world_size, rank, local_rank = (_number(env, k, d) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in env]
    if world_size > 1 and missing:
        raise UsageError(
            f"WORLD_SIZE is {world_size} but {', '.join(missing)} is not set",
            where="environment",
            fix="start with `torchrun --nproc-per-node N -m evatool ...`, or unset WORLD_SIZE",
        )
    if not 0 <= rank < world_size:
        raise UsageError(
            f"RANK is {rank}, but WORLD_SIZE is {world_size}",
            where="environment",
            expected=f"a rank from 0 to {world_size - 1}",
        )
    return JobEnvironment(rank, world_size, local_rank)


def _adopt_srun(env: MutableMapping[str, str]) -> None:
    # Only `srun` sets SLURM_STEP_NUM_TASKS: a process that the batch script itself starts is alone.
    if "RANK" in env or _number(env, "SLURM_STEP_NUM_TASKS", 1) == 1:
        return
    env["WORLD_SIZE"] = str(_number(env, "SLURM_STEP_NUM_TASKS", 1))
    env["RANK"] = str(_number(env, "SLURM_PROCID", 0))
    env["LOCAL_RANK"] = str(_number(env, "SLURM_LOCALID", 0))
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = first_node(nodes)
    env.setdefault("MASTER_PORT", str(_FIRST_PORT + _number(env, "SLURM_JOB_ID", 0) % _NUM_PORTS))


def first_node(nodes: str) -> str:
    """First name of a list of nodes as Slurm writes it, such as `gpu[03-05,09],login1`.

    Raises: UsageError where it is none.
    """
    match = re.match(r"([^\[\],]+)(?:\[(\w+)[^\]]*\]([^\[\],]*))?", nodes)
    if match is None:
        raise UsageError(
            f"the list of nodes {nodes!r} cannot be read",
            where="SLURM_STEP_NODELIST or SLURM_JOB_NODELIST",
            fix="set MASTER_ADDR to the first node's name",
        )
    before, number, after = match.groups()
    return before + (number or "") + (after or "")


def _number(env: MutableMapping[str, str], name: str, default: int) -> int:
    text = env.get(name, str(default))
    try:
        return int(text)
    except ValueError as error:
        raise UsageError(f"{name} = {text!r} is not a number", where="environment", expected="an integer") from error
