"""What a process of evatool sees to at its start: where it imports from, how its threads wait, with whom it ends.

Only commands do this, and the processes that they start; `import evatool` changes nothing of its user's process. No
torch here: how threads wait is read once, when torch loads its OpenMP library.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import MutableMapping

# Rounds that a thread of libgomp, the OpenMP library of torch's packages, looks for work before it sleeps: some 10 us.
# Its own choice, billions of rounds, keeps cores from the very thread that all wait for as soon as the machine is busy
# (docs/train.md#a-busy-machine has the measurements). How often a thread looks changes no number.
_SPIN_COUNT = "10000"
_THREAD_WAITS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")

PARENT_VARIABLE = "EVATOOL_PARENT_PID"
"""Set by a launcher of ours for what it starts: its own process id."""


def prepare_own_process() -> None:
    """To be called first by a command, before torch is imported; the processes that it starts inherit it."""
    sys.path[:] = [folder for folder in sys.path if folder]  # "" is the working folder, whatever lies there
    os.environ["PYTHONSAFEPATH"] = "1"  # for every Python that is started from here: see `evatool/__init__.py`
    set_thread_waits(os.environ)


def set_thread_waits(env: MutableMapping[str, str]) -> None:
    """Let threads that wait for each other sleep soon, unless the user has said how they wait."""
    if not any(name in env for name in _THREAD_WAITS):
        env["GOMP_SPINCOUNT"] = _SPIN_COUNT


def is_launched(env: MutableMapping[str, str] = os.environ) -> bool:
    """True in a rank whose parent is a launcher that starts ranks and nothing else: torchrun's or DeepSpeed's.

    Under Slurm, `srun` sees to it that no rank outlives the step.
    """
    is_deepspeed = "CROSS_RANK" in env and "LOCAL_SIZE" in env
    return "RANK" in env and ("TORCHELASTIC_RUN_ID" in env or is_deepspeed)


def end_with_parent(parent: int | None = None) -> None:
    """Have the system kill this process, unsaved, as soon as its parent is gone, however that ended.

    To be called early, and only where the parent's thread that started this process lives as long as the parent.

    Args:
        parent: process id of the parent where it is known: it may be gone already.
    """
    is_arranged = sys.platform == "linux" and _ask_kernel()
    now = os.getppid()
    if parent is not None and now != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    if not is_arranged:
        threading.Thread(target=_watch_parent, args=(now,), name="parent watch", daemon=True).start()


def launcher_pid(env: MutableMapping[str, str] = os.environ) -> int | None:
    """The process id that a launcher of ours has left in the environment."""
    text = env.get(PARENT_VARIABLE, "")
    return int(text) if text.isdigit() else None


_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def _ask_kernel() -> bool:
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        return bool(ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) == 0)
    return False


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(2)
    os.kill(os.getpid(), signal.SIGKILL)
