"""CPU time of what must feel instant, against importing the three packages that any such command line needs.

Run it on an idle machine: `python tests/benchmarks/startup.py`. The smallest of several runs counts.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys

RUNS = 10
# `import pydantic` alone loads nothing of it; Typer reads every argument through pydantic's type adapters.
BASELINE = [sys.executable, "-c", "import typer._adapters, rich.console; from pydantic import BaseModel"]
COMMANDS = {
    "import evatool": [sys.executable, "-c", "import evatool"],
    **{
        f"evatool {text}": [sys.executable, "-m", "evatool", *text.split()]
        for text in (
            "--version",
            "--help",
            "train-clip --help",
            "recipe list",
            "train-clip demo/train-clip --dry-run",
            "train-clip demo/train-clip --set train.sed=1",
            "train-clip gone.toml",
        )
    },
}


# As at a user's: compiled modules are kept (the first run makes them).
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def cpu_sec(command: list[str]) -> float:
    """User and system time of the command, the smallest of several runs."""
    found = []
    for _ in range(RUNS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found)


def main() -> None:
    """Print one row a command: seconds, and the ratio to the baseline, which should not exceed 1.5."""
    baseline = cpu_sec(BASELINE)
    print(f"{baseline:6.3f} s  1.00  importing typer, rich and pydantic")
    for name, command in COMMANDS.items():
        seconds = cpu_sec(command)
        print(f"{seconds:6.3f} s  {seconds / baseline:4.2f}  {name}")


if __name__ == "__main__":
    main()
