"""What reading costs: `python costs.py` reads lines of (reader, file) in JSON and answers each with its cost.

One process for many cases, whose imports and first uses are over before the first is measured: a case's memory is the
peak above the level before it, its time that of the processor.
"""

from __future__ import annotations

import gc
import importlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Cost:
    """What one file cost."""

    error: str
    """Class and first line of what was raised; "" where the file was accepted."""
    peak_bytes: int
    cpu_sec: float


def costs_of(cases: list[tuple[str, str]], warm_up: list[tuple[str, str]]) -> list[Cost]:
    """The cost of each (reader, argument), a reader being `module:function` that takes the argument as text."""
    lines = "\n".join(json.dumps(case) for case in (*warm_up, *cases))
    result = subprocess.run([sys.executable, __file__], input=lines, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    found = [Cost(**json.loads(line)) for line in result.stdout.splitlines() if line.startswith("{")]
    return found[len(warm_up) :]


def _memory(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _cost(reader: str, argument: str) -> Cost:
    module, _, function = reader.partition(":")
    read = getattr(importlib.import_module(module), function)
    gc.collect()
    before, begin = _memory("VmRSS"), time.process_time()
    Path("/proc/self/clear_refs").write_text("5")
    try:
        kept = read(argument)
        error = ""
    except Exception as raised:
        kept, error = None, f"{type(raised).__name__}: {(str(raised).splitlines() or [''])[0][:200]}"
    peak = _memory("VmHWM") - before
    del kept
    return Cost(error, peak, time.process_time() - begin)


if __name__ == "__main__":
    for case in sys.stdin:
        print(json.dumps(_cost(*json.loads(case)).__dict__), flush=True)
