"""Where the ranks of a job meet before they can exchange anything: a common store, and waits that say for whom.

torch's own start waits in C++ for as long as it takes, without a word, and hears no Ctrl-C. Here a rank looks again and
again, between Python's instructions, and after some seconds names those that are not there.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from evatool.core.errors import TransientError, UsageError
from evatool.distributed import peers
from evatool.distributed.launcher_env import JobEnvironment

log = logging.getLogger(__name__)

_FIRST_WORD_SEC, _NEXT_WORD_SEC = 3.0, 15.0
_MOST_NAMES = 8

_num_joined = 0  # jobs that this process has taken part in: a store may outlive one


class Meeting:
    """This rank at the common store.

    Args:
        timeout_sec: longest wait for the others.
    Raises: UsageError where rank 0 cannot open the store, TransientError where it does not appear in time.
    """

    def __init__(self, job: JobEnvironment, timeout_sec: float) -> None:
        global _num_joined
        _num_joined += 1
        self.rank, self.world_size, self._timeout_sec = job.rank, job.world_size, timeout_sec
        self._host, self._port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # torchrun keeps a store of its own for its ranks.
        self._is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._prefix = f"evatool/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_num_joined}"
        self._num_meetings = 0
        if self._is_host:
            self._tcp = self._open()
        else:
            self._wait_for_store()
            self._tcp = self._connect(timeout_sec)
        self.store = PrefixStore(self._prefix, self._tcp)

    @property
    def _is_host(self) -> bool:
        return self.rank == 0 and not self._is_agents

    def join(self) -> None:
        """Say that this rank is there, wait for all others, and watch them from then on."""
        me = peers.this_process(self.rank)
        self.store.set(f"who/{self.rank}", me.to_json())
        self.store.set(f"beat/{self.rank}", "0")
        self.meet("to join the job")
        store = PrefixStore(self._prefix, self._connect(10.0))
        peers.watch(peers.Peers(me, self.world_size, store, not self._is_agents))

    def meet(self, what: str) -> None:
        """Wait until every rank has called this; from the first seconds on, name those that have not.

        Args:
            what: what the others have to do first, after "waits for rank 1 ".
        Raises: TransientError where one is gone, or does not come in time.
        """
        self._num_meetings += 1
        key = f"meeting/{self._num_meetings}"
        try:
            self.store.set(f"{key}/{self.rank}", "")
            self.store.add(f"{key}/num", 1)
            self._wait_for_all(key, what)
        except RuntimeError as error:  # of the store itself
            dead = ", ".join(str(death) for death in peers.deaths())
            raise TransientError(
                dead or f"rank {self.rank} has lost the common store: rank 0 or the launcher has ended",
                where=f"{self._host}:{self._port}",
                fix="look at the log of rank 0, then run the same command again",
            ) from error

    def _wait_for_all(self, key: str, what: str) -> None:
        patience = _Patience(self._timeout_sec)
        while self.store.add(f"{key}/num", 0) < self.world_size:
            dead = peers.deaths()
            if dead:
                raise TransientError(
                    ", ".join(str(death) for death in dead),
                    where=f"rank {self.rank} waited for it {what}",
                    fix="run the same command again",
                )
            if patience.is_due():
                absent = self._absent(key, range(self.world_size))
                # Ranks above 0 are silent on the terminal unless they have to speak for it.
                level = logging.ERROR if absent[:1] == [0] and self.rank > 0 else logging.WARNING
                log.log(level, "rank %d waits for %s %s: %.0f s", self.rank, _names(absent), what, patience.waited_sec)
                if patience.is_over():
                    raise _nobody_came(self.rank, _names(absent), what, patience.waited_sec)
            patience.sleep()

    def _absent(self, key: str, ranks: range) -> list[int]:
        """Those of the ranks that have not come, found by halves."""
        if not ranks or self.store.check([f"{key}/{rank}" for rank in ranks]):
            return []
        if len(ranks) == 1:
            return list(ranks)
        middle = len(ranks) // 2
        return self._absent(key, ranks[:middle]) + self._absent(key, ranks[middle:])

    # ---------------------------------------------------------------------------------------------- the store

    def _open(self) -> TCPStore:
        try:
            return self._store(is_host=True, timeout_sec=self._timeout_sec)
        except RuntimeError as error:
            raise UsageError(
                f"port {self._port} of {self._host} cannot be opened: {str(error).splitlines()[0]}",
                where="MASTER_ADDR and MASTER_PORT",
                expected="an address of the machine of rank 0, and a port that nothing else uses",
                fix="set another MASTER_PORT",
            ) from error

    def _wait_for_store(self) -> None:
        """Look whether something listens there, so that torch need not wait, which says pages while it does."""
        patience = _Patience(self._timeout_sec)
        whom = "torchrun's store" if self._is_agents else "rank 0"
        while True:
            try:
                socket.create_connection((self._host, self._port), timeout=2.0).close()
                return
            except OSError as error:
                if patience.is_due():
                    where = f"at {self._host}:{self._port} ({error.strerror or error})"
                    log.error("rank %d waits for %s %s: %.0f s", self.rank, whom, where, patience.waited_sec)
                    if patience.is_over():
                        raise _nobody_came(self.rank, whom, where, patience.waited_sec) from error
            patience.sleep()

    def _connect(self, timeout_sec: float) -> TCPStore:
        return self._store(is_host=False, timeout_sec=timeout_sec)

    def _store(self, *, is_host: bool, timeout_sec: float) -> TCPStore:
        return TCPStore(
            self._host,
            self._port,
            self.world_size,
            is_master=is_host,
            timeout=timedelta(seconds=timeout_sec),
            wait_for_workers=False,
            multi_tenant=True,
        )


class _Patience:
    """A wait in short slices: when to speak, and when to give up."""

    def __init__(self, timeout_sec: float) -> None:
        self._start = time.monotonic()
        self._timeout_sec = timeout_sec
        self._next_word_sec = min(_FIRST_WORD_SEC, timeout_sec)
        self._slice_sec = 0.005

    @property
    def waited_sec(self) -> float:
        return time.monotonic() - self._start

    def is_due(self) -> bool:
        if self.waited_sec < self._next_word_sec:
            return False
        self._next_word_sec = min(self.waited_sec + _NEXT_WORD_SEC, max(self._timeout_sec, self.waited_sec))
        return True

    def is_over(self) -> bool:
        return self.waited_sec >= self._timeout_sec

    def sleep(self) -> None:
        time.sleep(self._slice_sec)
        self._slice_sec = min(0.25, 1.5 * self._slice_sec)


def _names(ranks: list[int]) -> str:
    if not ranks:
        return "nobody any more"
    shown = ", ".join(str(rank) for rank in ranks[:_MOST_NAMES])
    more = f" and {len(ranks) - _MOST_NAMES} more" if len(ranks) > _MOST_NAMES else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}{more}"


def _nobody_came(rank: int, whom: str, what: str, waited_sec: float) -> TransientError:
    return TransientError(
        f"rank {rank} has waited {waited_sec:.0f} s for {whom} {what}",
        expected="all ranks of the job, started within that time",
        fix="look at the logs of those that are missing, then run the same command again",
    )


_current: Meeting | None = None


def join(job: JobEnvironment, timeout_sec: float) -> Store:
    """Meet the other ranks; every rank calls it.

    Returns: the common store, for torch's process group.
    Raises: as `Meeting`.
    """
    global _current
    meeting = Meeting(job, timeout_sec)
    meeting.join()
    _current = meeting
    return meeting.store


def meet(what: str) -> None:
    """Wait for all ranks before an exchange that one of them may come to late; nothing in a job of one process.

    Args:
        what: what the late ones do first, as in "to open the run folder".
    Raises: TransientError where one is gone, or does not come in time.
    """
    if _current is not None:
        _current.meet(what)


def leave() -> None:
    """Watch nobody any more."""
    global _current
    peers.watch(None)
    _current = None
