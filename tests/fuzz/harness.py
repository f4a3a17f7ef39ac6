"""Readers of foreign files against broken input: seeds, mutations, and what counts as a finding.

A fuzzer is a reader, some valid inputs and the words of the format. `run_fuzzer` starts it in a process of its own,
gives it changed inputs until the time is over, and reports every input that makes the reader

    raise anything but an error that the user can mend (`EvatoolError` and what the fuzzer names beside it),
    take more than 10 seconds (the process is ended then),
    take more memory than 64 MB and twice the input above the level before, or
    end the process.

Each finding is kept as a file in the folder of findings and printed in base64: `--case FILE` runs it again.
"""

from __future__ import annotations

import base64
import faulthandler
import hashlib
import json
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evatool.core.errors import EvatoolError

ROOT = Path(__file__).resolve().parents[2]
MAX_CASE_SEC = 10
FREE_BYTES = 64 * 2**20
MAX_INPUT_BYTES = 2**20

_NUMBERS = [
    *(n.to_bytes(size, order) for size in (1, 2, 4, 8) for order in ("little", "big") for n in (0, 1, 127, 128, 255)),
    *(b"\xff" * size for size in (2, 4, 8)),
    *(b"\xff" * (size - 1) + b"\x7f" for size in (2, 4, 8)),
    *(b"\x7f" + b"\xff" * (size - 1) for size in (4, 8)),
]


@dataclass(frozen=True)
class Fuzzer:
    """A reader and what it is fed.

    Attributes:
        name: as the command line takes it.
        seeds: makes the valid inputs, once a process; it may use the folder for files.
        read: reads one input. Gets the bytes and an empty folder that lives as long as the process.
        words: pieces of the format that mutations insert.
        refusals: exceptions that are right beside `EvatoolError`.
        mutate: changes an input in a way of the format's own; None to change bytes only.
    """

    name: str
    seeds: Callable[[Path], Sequence[bytes]]
    read: Callable[[bytes, Path], None]
    words: Sequence[bytes] = ()
    refusals: tuple[type[BaseException], ...] = ()
    mutate: Callable[[bytes, random.Random], bytes] | None = None


@dataclass
class Totals:
    """What a fuzzer did."""

    executions: int = 0
    accepted: int = 0
    seconds: float = 0.0
    findings: list[str] = field(default_factory=list)
    """What was found, one line each, with the file to run it again."""


# ------------------------------------------------------------------------------------------------------ mutations


def changed(data: bytes, others: Sequence[bytes], words: Sequence[bytes], rng: random.Random) -> bytes:
    """An input after one to six random changes: bits, numbers, words, cuts, repeats, pieces of other inputs."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        at = rng.randrange(len(found) + 1)
        end = min(len(found), at + rng.choice((1, 2, 4, 8, 16, 64, 512)))
        match rng.randrange(9):
            case 0 if found:
                found[at % len(found)] ^= 1 << rng.randrange(8)
            case 1 if found:
                found[at % len(found)] = rng.randrange(256)
            case 2:
                number = rng.choice(_NUMBERS)
                found[at : at + len(number)] = number
            case 3 if words:
                found[at:at] = rng.choice(words)
            case 4 if words:
                word = rng.choice(words)
                found[at : at + len(word)] = word
            case 5:
                del found[at:end]
            case 6:
                found[at:at] = bytes(found[at:end]) * rng.choice((1, 2, 16, 256))
            case 7:
                del found[at:]
            case 8:
                other = rng.choice(others)
                start = rng.randrange(len(other) + 1)
                found[at:end] = other[start : start + rng.choice((4, 32, 256, 4096))]
    return bytes(found[:MAX_INPUT_BYTES])


# ------------------------------------------------------------------------------------------------------ one process


def fuzz(fuzzer: Fuzzer, seconds: float, seed: int, folder: Path) -> Totals:
    """Feed a fuzzer in this process until the time is over; inputs that were accepted become seeds of later ones.

    Args:
        folder: gets `current`, the input that is being read, a file for each finding, and the reader's own folder.
    """
    rng = random.Random(seed)
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    corpus = list(fuzzer.seeds(work))
    totals, begin = Totals(), time.monotonic()
    known: set[str] = set()
    waiting = list(corpus)  # first the seeds as they are: they also warm up what is loaded on first use
    while time.monotonic() < begin + seconds or waiting:
        if waiting:
            data, limit = waiting.pop(0), None
        else:
            base = rng.choice(corpus)
            own = fuzzer.mutate is not None and rng.random() < 0.5
            data = fuzzer.mutate(base, rng) if own and fuzzer.mutate else changed(base, corpus, fuzzer.words, rng)
            limit = FREE_BYTES + 2 * len(data)
        (folder / "current").write_bytes(data)
        problem = run_case(fuzzer, data, work, limit)
        totals.executions += 1
        totals.accepted += problem == ""
        if problem == "" and len(corpus) < 2000 and rng.random() < 0.05:
            corpus.append(data)
        if problem and problem.splitlines()[0] not in known:
            known.add(problem.splitlines()[0])
            totals.findings.append(keep_case(fuzzer, data, problem, folder))
    totals.seconds = time.monotonic() - begin
    return totals


def run_case(fuzzer: Fuzzer, data: bytes, work: Path, limit: int | None) -> str | None:
    """ "" where the reader accepted the input, None where it refused it rightly, else what is wrong.

    Args:
        limit: bytes of memory above the level before; None for no limit, neither of memory nor of time.
    """
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at the present level
    if limit is not None:
        faulthandler.dump_traceback_later(MAX_CASE_SEC, exit=True)
    try:
        fuzzer.read(data, work)
        problem: str | None = ""
    except (EvatoolError, *fuzzer.refusals):
        problem = None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "evatool" in frame.filename] or frames
        place = f"{Path(own[-1].filename).name}, {own[-1].name}"
        problem = f"{type(error).__name__} in {place}\n{''.join(traceback.format_exception(error))}"
    finally:
        faulthandler.cancel_dump_traceback_later()
    if limit is not None and _memory("VmHWM") - before > limit:
        problem = f"too much memory\n{(_memory('VmHWM') - before) >> 20} MiB for {len(data)} bytes"
    return problem


def keep_case(fuzzer: Fuzzer, data: bytes, problem: str, folder: Path) -> str:
    """Write the input of a finding to a file of its own and print how to run it again; returns a line about it."""
    file = folder / f"{fuzzer.name}-{hashlib.sha256(data).hexdigest()[:12]}.case"
    file.write_bytes(data)
    shown = base64.b64encode(data).decode() if len(data) <= 4096 else f"{len(data)} bytes"
    print(f"FOUND {problem}\n  again: python -m tests.fuzz {fuzzer.name} --case {file}\n  base64: {shown}", flush=True)
    return f"{problem.splitlines()[0]}: {file}"


def _memory(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


# ------------------------------------------------------------------------------------------------------ many processes


def run_fuzzer(name: str, seconds: float, seed: int, folder: Path) -> Totals:
    """Feed a fuzzer in a process of its own; where that dies, the input is a finding and the next process goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    totals, begin = Totals(), time.monotonic()
    while (left := seconds - (time.monotonic() - begin)) > 0:
        command = [sys.executable, "-m", "tests.fuzz", name, "--here", "--seconds", f"{left:.1f}"]
        command += ["--seed", str(seed), "--folder", str(folder)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        sys.stdout.write("".join(line for line in result.stdout.splitlines(True) if not line.startswith("TOTALS ")))
        done = [line for line in result.stdout.splitlines() if line.startswith("TOTALS ")]
        if done:
            found = Totals(**json.loads(done[-1].removeprefix("TOTALS ")))
            totals.executions += found.executions
            totals.accepted += found.accepted
            totals.findings += found.findings
            break
        current = folder / "current"
        if not current.is_file():
            raise RuntimeError(f"the fuzzer {name} did not begin:\n{result.stderr}")
        case = folder / f"{name}-ended-{seed}.case"
        current.replace(case)
        end = "took too long" if "Timeout" in result.stderr else f"ended the process ({result.returncode})"
        print(f"FOUND {end}: {case}\n{result.stderr}", flush=True)
        totals.findings.append(f"{end}: {case}")
        seed += 1
    totals.seconds = time.monotonic() - begin
    return totals
