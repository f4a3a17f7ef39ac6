"""Who owns a run folder: one start at a time, named in `lease.json`, and alive while a counter in it moves. No torch.

    {"counter": "000000000012", "token": ..., "host": ..., "boot_id": ..., "pid_namespace": ..., "pid": ...,
     "start_time": ..., "shared_by": ...}

A lease is taken by making the file under its name where there is none, which the file system lets one process do. The
file of an owner that is gone is moved aside first, looked at again there, and put back if it is somebody else's by
then. So nobody ever writes over a lease, and whoever finds another's token under the name has lost the folder.

An owner whose process can be looked up (same boot, same pid namespace) is gone when its process is. Any other is on
another machine of a shared storage, in another container, or from before a reboot: it is gone once its counter has
stood still for `STILL_SEC` on the watcher's own clock. No two clocks are ever compared.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from evatool.core.errors import RunFolderTakenError

log = logging.getLogger(__name__)

LEASE = "lease.json"
TOKEN_VARIABLE = "EVATOOL_LEASE_TOKEN"
"""Environment variable by which a launcher gives its ranks the token to hold the folder under."""
BEAT_SEC = 5.0
"""Seconds between two moves of an owner's counter."""
STILL_SEC = 60.0
"""Seconds for which the counter of an owner elsewhere has to stand still until it counts as gone."""
_POLL_SEC = 0.5

_COUNTER_AT = len('{"counter": "')
_COUNTER_DIGITS = 12


@dataclass(frozen=True)
class Holder:
    """The process that a lease names."""

    token: str
    host: str
    boot_id: str
    """Of the running kernel; empty where the system does not tell."""
    pid_namespace: str
    """In which `pid` means something; empty where the system does not tell."""
    pid: int
    start_time: int
    """Of the process, in the kernel's ticks after boot: it tells apart processes that had the same number in turn."""
    shared_by: str = ""
    """What tasks that may write into one folder at a time have in common; empty for an owner that is alone."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def is_alive(self) -> bool | None:
        """Whether another process has the folder; None where that cannot be looked up from here.

        What this process holds it may take anew: whoever opened the folder before it finds that out by `Lease.check`.
        """
        here = _own_place()
        if not here[0] or here != (self.boot_id, self.pid_namespace):
            return None
        started = _start_time(self.pid)
        if started is not None:
            return started == self.start_time and self.pid != os.getpid()
        # Processes of other users may be hidden from /proc, but not from this.
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            return None
        return False  # it runs and has no start time: a zombie


class Lease:
    """A folder that this process owns, from `take_lease` to `release`. A thread of its own moves the counter."""

    def __init__(self, path: Path, holder: Holder) -> None:
        _create(path, holder)
        self.path, self.token = path, holder.token
        self._holder = holder
        self._released = threading.Event()
        threading.Thread(target=self._beat, name="lease", daemon=True).start()

    def check(self) -> None:
        """Make sure, before writing what other starts write too, that the folder is still this process's.

        Raises: RunFolderTakenError where another start has taken it over.
        """
        try:
            found = _read(self.path)
        except OSError:  # a storage that does not answer: the write that follows will say so
            return
        if self._released.is_set() or _token(found) == self.token:
            return
        if _first_rival(self.path, self._holder) is None:
            # Someone removed or damaged the file, and nobody has the folder: the lease is put back.
            _remove(self.path, found)
            with contextlib.suppress(FileExistsError):
                _create(self.path, self._holder)
                return
        rival = _first_rival(self.path, self._holder)
        raise _taken_over(self.path.parent, _parse(_read(rival)) if rival else None)

    def release(self) -> None:
        """Give the folder free; harmless when called twice, or after it was taken over, or in a forked child."""
        if self._released.is_set() or os.getpid() != self._holder.pid:
            return
        self._released.set()
        with contextlib.suppress(OSError):
            found = _read(self.path)
            if _token(found) == self.token:
                _remove(self.path, found)

    def _beat(self) -> None:
        counter = 0
        while not self._released.wait(BEAT_SEC):
            counter += 1
            # A full disk or a store that does not answer: the next may get through.
            with contextlib.suppress(OSError):
                if not self._move(counter):
                    return

    def _move(self, counter: int) -> bool:
        """Write the counter into the lease; False, and nothing is written, where it is another's by now.

        It goes into the file that was read, whatever stands under the name a moment later. That is opened anew each
        time, since a shared storage shows to others what has been closed.
        """
        with self.path.open("r+b", buffering=0) as file:
            token = _token(file.read())
            if token == self.token:
                file.seek(_COUNTER_AT)
                file.write(f"{counter:0{_COUNTER_DIGITS}d}".encode())
            return token in (self.token, None)


def take_lease(folder: Path, *, shared_by: str = "", task: str = "") -> Lease:
    """Make this process the owner of a folder; whose owner is gone, it takes it over.

    Waits, and says so, where the owner cannot be looked up from here.

    Args:
        shared_by: what the tasks of one job have in common: they may hold the folder together, each under its name.
        task: this task's name among them.
    Raises: RunFolderTakenError, naming the owner, where it lives; OSError where the folder cannot be written.
    """
    assert bool(shared_by) == bool(task), "a task has a name and a job"
    holder = _own_holder(shared_by)
    path = folder / (f"{LEASE}.{task}" if task else LEASE)
    watch = _Watch(folder)
    try:
        while True:
            with _alone(folder):
                rival = path if path.exists() else _first_rival(path, holder)
                if rival is None:
                    try:
                        lease = Lease(path, holder)
                    except FileExistsError:
                        continue  # another start was faster
                    if _first_rival(path, holder) is None:
                        return lease
                    lease.release()  # both were made at once: whoever sees the other steps back
                    continue
                is_known = watch.look_at(rival)
            if not is_known:
                time.sleep(min(_POLL_SEC, STILL_SEC / 10))
    finally:
        # Only now: until there is a new lease, what is left of the old one shows that a run was here and was killed.
        for left in watch.moved_aside:
            left.unlink(missing_ok=True)


def check_free(folder: Path) -> None:
    """Refuse a folder whose owner runs on this machine. Whether others live is found out by whoever takes the lease.

    Raises: RunFolderTakenError naming the owner.
    """
    for path in _leases(folder):
        holder = _parse(_read(path))
        if holder is not None and holder.is_alive:
            raise _in_use(folder, holder)


def read_token(folder: Path) -> str | None:
    """The token that a folder is held under; None where nobody holds it alone."""
    return _token(_read(folder / LEASE))


def check_token(folder: Path, token: str | None) -> None:
    """Make sure that nobody but the holder of a token has a folder: for those that speak for it, and hold nothing.

    Raises: RunFolderTakenError where another start has taken it over.
    """
    holder = _parse(_read(folder / LEASE))
    if holder is not None and token is not None and holder.token != token:
        raise _taken_over(folder, holder)


def new_token() -> str:
    """A token that nobody else has."""
    return uuid.uuid4().hex


def is_lease(name: str) -> bool:
    """True for the names of lease files, those among them that are being made or removed."""
    return _is_current(name) or name.startswith(f".{LEASE}.")


def _is_current(name: str) -> bool:
    return name == LEASE or name.startswith(f"{LEASE}.")


class _Watch:
    """Waits for owners to be gone, each for as long as it takes to tell."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._text: bytes | None = None
        self._since = 0.0
        self._said = ""
        self.moved_aside: list[Path] = []

    def look_at(self, path: Path) -> bool:
        """One look at a lease, after which the caller looks at the folder anew; the lease of one gone is moved aside.

        Returns: False where it cannot be told yet whether its owner lives.
        Raises: RunFolderTakenError where it does.
        """
        text = _read(path)
        if text is None:
            return True
        holder = _parse(text)
        alive = None if holder is None else holder.is_alive
        how = "which is gone"
        if alive is None:
            alive, how = self._is_moving(text, holder), f"which has not moved its counter for {STILL_SEC:g} s"
        if alive and holder is not None:
            raise _in_use(self._folder, holder)
        if alive is not None and (aside := _move_aside(path, text)) is not None:
            self.moved_aside.append(aside)
            log.info("%s: taken over from %s, %s", self._folder, holder or "an owner that cannot be read", how)
        return alive is not None

    def _is_moving(self, text: bytes, holder: Holder | None) -> bool | None:
        """Whether the counter moves; False once it has stood still for long enough, None until then."""
        now, before = time.monotonic(), _parse(self._text)
        if text != self._text:
            self._text, self._since = text, now
            if holder is not None and before is not None and before.token == holder.token:
                return True
        if now - self._since >= STILL_SEC:
            return False
        who = str(holder) if holder is not None else "an owner whose lease cannot be read"
        if who != self._said:
            self._said = who
            log.warning(
                "%s is held by %s, which cannot be looked up from here: waiting up to %g s to see whether it lives",
                self._folder,
                who,
                STILL_SEC,
            )
        return None


def _in_use(folder: Path, holder: Holder) -> RunFolderTakenError:
    return RunFolderTakenError(
        f"the run folder is in use by {holder}",
        where=str(folder),
        expected="one start at a time in a folder",
        fix="wait for it to end, or stop it and use --resume, or choose another folder with --run-dir",
    )


def _taken_over(folder: Path, by: Holder | None) -> RunFolderTakenError:
    return RunFolderTakenError(
        f"the run folder was taken over by {by or 'another start'}",
        where=str(folder),
        expected="a folder of this start's own, which stops here and writes nothing more into it",
        fix="leave it to the other start, or choose another folder with --run-dir",
    )


# ------------------------------------------------------------------------------------------------------- the file


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One start of this machine at a time: between a look at a lease and its move aside, another could take the folder.

    The folder itself is locked, so that nothing is left behind. A storage that locks no folders, and another machine,
    leave that moment open: whoever loses the folder in it finds out by `Lease.check` and stops before it writes.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _create(path: Path, holder: Holder) -> None:
    """Make the lease. Raises: FileExistsError where there is one."""
    text = (json.dumps({"counter": "0" * _COUNTER_DIGITS, **asdict(holder)}) + "\n").encode()
    draft = _aside(path)
    _write_new(draft, text)
    try:
        os.link(draft, path)
    except FileExistsError:
        raise
    except OSError:  # a storage without links: the file is empty for a moment, and watched as an unreadable one
        _write_new(path, text)
    finally:
        draft.unlink(missing_ok=True)


def _write_new(path: Path, text: bytes) -> None:
    """A new file, flushed to the disk; none where that fails."""
    with path.open("xb") as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def _remove(path: Path, seen: bytes | None) -> None:
    """Remove a lease that still names the owner that was `seen` in it."""
    aside = _move_aside(path, seen)
    if aside is not None:
        aside.unlink(missing_ok=True)


def _move_aside(path: Path, seen: bytes | None) -> Path | None:
    """Take a lease from its name, if it still names the owner that was `seen` in it; None where it does not."""
    aside = _aside(path)
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return None
    if _token(_read(aside)) == _token(seen):
        return aside
    with contextlib.suppress(OSError):  # taken in between, or no links: then its owner puts it back
        os.link(aside, path)
    aside.unlink(missing_ok=True)
    return None


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")


def _leases(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"{LEASE}*") if _is_current(path.name))


def _first_rival(own: Path, holder: Holder) -> Path | None:
    """A lease of the folder beside which `holder` may not have its own, which stands at `own` or will."""
    for path in _leases(own.parent):
        named = _parse(_read(path))
        if named is None:
            if path != own:
                return path
        elif named.token != holder.token and (path == own or not _share(named, holder)):
            return path
    return None


def _share(one: Holder, other: Holder) -> bool:
    return bool(one.shared_by) and one.shared_by == other.shared_by


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):  # the second where another machine has just replaced it
            return None
        raise


def _token(text: bytes | None) -> str | None:
    holder = _parse(text)
    return None if holder is None else holder.token


def _parse(text: bytes | None) -> Holder | None:
    """The owner that a lease names; None where there is none, or none that can be read."""
    try:
        table = json.loads(text or b"")
        return Holder(
            token=str(table["token"]),
            host=str(table["host"]),
            boot_id=str(table["boot_id"]),
            pid_namespace=str(table["pid_namespace"]),
            pid=int(table["pid"]),
            start_time=int(table["start_time"]),
            shared_by=str(table["shared_by"]),
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


# ------------------------------------------------------------------------------------------------------ processes


def _own_holder(shared_by: str) -> Holder:
    token = os.environ.get(TOKEN_VARIABLE) or new_token()
    return Holder(token, platform.node(), *_own_place(), os.getpid(), _start_time(os.getpid()) or 0, shared_by)


def _own_place() -> tuple[str, str]:
    """Boot and pid namespace of this process; empty where the system does not tell, or tells of other processes."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
        own_number = int(Path("/proc/self/stat").read_bytes().split()[0])
    except (OSError, ValueError):
        return "", ""
    return (boot_id, namespace) if own_number == os.getpid() else ("", "")


def _start_time(pid: int) -> int | None:
    """When a process started, in ticks after boot; None where there is none, or only what is left of one."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    state, *fields = stat.rpartition(b")")[2].split()  # the name before it may hold anything
    return None if state in (b"Z", b"X") else int(fields[18])
