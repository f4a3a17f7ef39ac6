"""The other ranks of a job while it runs: which of them are gone, and which give no sign of life. No torch.

Of a rank on the same machine the system tells at once that it ended, and by which signal. Of every rank the common
store tells how often it has said that it lives, which a thread of each does; a rank whose process is stopped, or whose
machine is gone, says no more. So whoever waits in vain can name the rank that it waits for.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import select
import signal
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from evatool.core.errors import ExitCode
from evatool.core.stop_signals import end_process

log = logging.getLogger(__name__)

_BEAT_SEC = 2.0
_SILENT_SEC = 6.0
"""Without a beat for so long a rank counts as silent: three beats."""
_STORE_SEC = 10.0
"""How long the common store may take to answer."""
_END_ALONE_SEC = 20.0
"""Seconds after a rank was killed until the others end, where their main threads do not notice by themselves."""
_TOLD_TO_END = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_NEIGHBOURS = 64
"""Ranks of one machine have numbers that lie no further apart."""


class Store(Protocol):
    """What is used of torch's stores."""

    def set(self, key: str, value: str) -> None: ...
    def check(self, keys: list[str]) -> bool: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...


@dataclass(frozen=True)
class PeerProcess:
    """One rank's process. `place` is equal where process ids mean the same."""

    rank: int
    host: str
    place: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"

    def to_json(self) -> str:
        return json.dumps([self.rank, self.host, self.place, self.pid])


def peer_from_json(text: bytes) -> PeerProcess:
    """Reads what `PeerProcess.to_json` has written."""
    return PeerProcess(*json.loads(text))


def this_process(rank: int) -> PeerProcess:
    """This process."""
    place = ""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        place = file.read().strip() + os.readlink("/proc/self/ns/pid")
    return PeerProcess(rank, platform.node(), place, os.getpid())


@dataclass(frozen=True)
class Death:
    """A rank that ended by a signal."""

    member: PeerProcess
    signal: str

    def __str__(self) -> str:
        return f"{self.member} was killed by {self.signal}"


class Peers:
    """Watches the other ranks from the moment that all are there until `close`.

    Args:
        me: this rank.
        store: a connection to the common store that nothing else uses: a store that does not answer holds its user.
        is_store_of_rank_0: rank 0 itself keeps the store, and no launcher does.
    """

    def __init__(self, me: PeerProcess, world_size: int, store: Store, is_store_of_rank_0: bool) -> None:
        self._me, self._world_size, self._store = me, world_size, store
        self._is_store_of_rank_0 = is_store_of_rank_0
        near = range(max(0, me.rank - _NEIGHBOURS), min(world_size, me.rank + _NEIGHBOURS + 1))
        members = [peer_from_json(text) for text in store.multi_get([f"who/{rank}" for rank in near])]
        self._near = [m for m in members if m.place and m.place == me.place and m.rank != me.rank]
        self._deaths: list[Death] = []
        self._closed = threading.Event()
        self._has_died = threading.Event()
        self._beat(0)

    def start(self) -> None:
        """Begin to watch, and to say that this rank lives."""
        threading.Thread(target=self._beat_on, name="sign of life", daemon=True).start()
        if self._near and hasattr(os, "pidfd_open"):
            threading.Thread(target=self._watch, name="peer watch", daemon=True).start()

    def close(self) -> None:
        """Leave: what becomes of this rank from now on does not concern the others."""
        self._closed.set()
        with contextlib.suppress(RuntimeError):
            self._store.set(f"left/{self._me.rank}", "")

    # -------------------------------------------------------------------------------------------- who is gone

    def deaths(self, wait_sec: float = 0.0) -> Sequence[Death]:
        """The ranks of this machine that a signal ended, the first one first; waits for the first one."""
        self._has_died.wait(wait_sec)
        return self._deaths

    def missing(self) -> list[str]:
        """The ranks that give no sign of life, in words; takes some seconds."""
        stopped = [member for member in self._near if _state(member.pid) in ("T", "t")]
        _gone.update(member.rank for member in stopped)
        if stopped:
            return [f"{member} is stopped (SIGSTOP, or a debugger)" for member in stopped]
        found: list[PeerProcess] | None = None

        def ask() -> None:
            nonlocal found
            with contextlib.suppress(RuntimeError):
                found = self._without_beat()

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(_SILENT_SEC + _STORE_SEC)
        if found is None:
            if not self._is_store_of_rank_0 or self._me.rank == 0:
                return []
            _gone.add(0)
            return ["rank 0, which keeps the common store, does not answer"]
        _gone.update(member.rank for member in found)
        return [f"{member} gives no sign of life" for member in found]

    def _without_beat(self) -> list[PeerProcess]:
        keys = [f"beat/{rank}" for rank in range(self._world_size)]
        before = self._store.multi_get(keys)
        time.sleep(_SILENT_SEC)
        after = self._store.multi_get(keys)
        silent = [r for r in range(self._world_size) if before[r] == after[r] and r != self._me.rank]
        return [peer_from_json(text) for text in self._store.multi_get([f"who/{rank}" for rank in silent])]

    # ------------------------------------------------------------------------------------------------ threads

    def _beat(self, number: int) -> None:
        self._store.set(f"beat/{self._me.rank}", str(number))

    def _beat_on(self) -> None:
        number = 0
        while not self._closed.wait(_BEAT_SEC):
            number += 1
            try:
                self._beat(number)
            except RuntimeError:
                return  # the store is gone, with rank 0 or the launcher

    def _watch(self) -> None:
        poll, open_files = select.poll(), {}
        for member in self._near:
            with contextlib.suppress(OSError):  # gone already: who waits for it will notice
                descriptor = os.pidfd_open(member.pid)
                open_files[descriptor] = member
                poll.register(descriptor, select.POLLIN)
        while open_files and not self._closed.is_set():
            for descriptor, _ in poll.poll(500):
                number = _ending_signal(descriptor, open_files[descriptor].pid)
                self._note_end(open_files.pop(descriptor), number)
                poll.unregister(descriptor)
                os.close(descriptor)
        for descriptor in open_files:
            os.close(descriptor)

    def _note_end(self, member: PeerProcess, number: int | None) -> None:
        if not number or number in _TOLD_TO_END or self._closed.is_set() or self._has_left(member):
            return
        death = Death(member, signal.Signals(number).name)
        self._deaths.append(death)
        _gone.add(member.rank)
        log.error("%s", death)
        if _listener is not None:
            _listener(death)
        self._has_died.set()
        threading.Thread(target=self._end_alone, args=(death,), name="end alone", daemon=True).start()

    def _has_left(self, member: PeerProcess) -> bool:
        try:
            return self._store.check([f"left/{member.rank}"])
        except RuntimeError:
            return False

    def _end_alone(self, death: Death) -> None:
        if not self._closed.wait(_END_ALONE_SEC):
            end_process(ExitCode.TRANSIENT, f"{death}, and {self._me} waited for it")


_PIDFD_GET_INFO = 0xC040FF0B
_PIDFD_INFO_EXIT = 1 << 3
_PIDFD_INFO = struct.Struct("QQ11Ii")  # mask, control group, eleven ids, status as `wait` has it


def _ending_signal(descriptor: int, pid: int) -> int | None:
    """The signal that ended a process, 0 if it ended by itself; None where nobody can tell any more.

    Newer kernels (6.15) tell for good; others only until its parent has asked.
    """
    try:
        asked = _PIDFD_INFO.pack(_PIDFD_INFO_EXIT, *[0] * 13)
        mask, *_, status = _PIDFD_INFO.unpack(fcntl.ioctl(descriptor, _PIDFD_GET_INFO, asked))
        if mask & _PIDFD_INFO_EXIT:
            return int(status) & 0x7F
    except OSError:
        pass
    fields = _stat(pid)
    return int(fields[49]) & 0x7F if fields and fields[0] in ("Z", "X") else None


def _state(pid: int) -> str:
    """One letter as `ps` shows it; empty for a process that is gone."""
    return (_stat(pid) or [""])[0]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the program's name."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


# ------------------------------------------------------------------------------------------- those of this process

_listener: Callable[[Death], None] | None = None
_current: Peers | None = None
_gone: set[int] = set()


def listen(listener: Callable[[Death], None] | None) -> None:
    """Who is told, in another thread, of each rank that a signal ended."""
    global _listener
    _listener = listener


def watch(peers: Peers | None) -> None:
    """The peers of this process from now on; None: it has none any more."""
    global _current
    if _current is not None:
        _current.close()
    _current = peers
    if peers is not None:
        _gone.clear()
        peers.start()


def is_gone(rank: int) -> bool:
    """True where a rank of the job, or of the last one, was found dead or silent before."""
    return rank in _gone


def missing() -> list[str]:
    """The ranks that give no sign of life, in words; takes some seconds."""
    return [] if _current is None else _current.missing()


def deaths() -> Sequence[Death]:
    """The ranks that a signal ended so far."""
    return [] if _current is None else _current.deaths()


_BROKEN = (
    "connection closed",
    "connection reset",
    "connection refused",
    "broken pipe",
    "socket",
    "gloo",
    "nccl",
)


def cause_of(error: Exception) -> list[str]:
    """The ranks whose end lies behind an exchange that failed, in words; waits some seconds for them to be known."""
    text = str(error).lower()
    is_exchange = isinstance(error, RuntimeError) and any(word in text for word in _BROKEN)
    if _current is None or not is_exchange:
        return []
    dead = _current.deaths(wait_sec=2.0)
    return [str(death) for death in dead] or _current.missing()
