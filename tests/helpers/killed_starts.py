"""Kills the opening of a run folder at each of its file operations, and opens the folder again each time.

python killed_starts.py FOLDER     prints one JSON line a kill: which operation, what was left, what came of it
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from evatool.recipe.load import load_recipe
from evatool.runs import environment
from evatool.runs.lease import is_lease
from evatool.runs.run_dir import RunOptions, open_run_dir

RECIPE = load_recipe("debug/train-clip").recipe
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.truncate")
environment._git_commit = lambda: None  # two processes a start, and no file of the run folder


class KillAt:
    """Ends this process by SIGKILL before its n-th operation on a file of the folder, which is after the one before."""

    def __init__(self, folder: Path, number: int) -> None:
        self._folder, self._left = str(folder), number

    def __call__(self, event: str, args: tuple[object, ...]) -> None:
        if event not in OPERATIONS or not str(args[0]).startswith(self._folder):
            return
        self._left -= 1
        if self._left < 0:
            os.kill(os.getpid(), signal.SIGKILL)


def in_child(action: Callable[[], None]) -> int:
    """The exit status of a forked process that does it."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def start(folder: Path, resume: bool = False) -> None:
    """A start that makes nothing and ends well."""
    open_run_dir(RECIPE, RunOptions("killed", folder, resume)).close()


def kill_at_each(base: Path, before: Path | None) -> Path:
    """All kills of a start in a copy of `before`, up to one that comes too late; the folder that this one left."""
    for number in range(100):
        folder = base / f"{number:03d}"
        if before is not None:
            shutil.copytree(before, folder)

        def killed(folder: Path = folder, number: int = number) -> None:
            sys.addaudithook(KillAt(folder, number))
            open_run_dir(RECIPE, RunOptions("killed", folder))

        if in_child(killed) != -signal.SIGKILL:
            return folder
        left = sorted(path.name for path in folder.rglob("*")) if folder.exists() else []
        answers: dict[str, object] = {}
        for name, resume in (("plain", False), ("resume", True)):
            copy = base / f"{number:03d}-{name}"
            if folder.exists():
                shutil.copytree(folder, copy)
            answers[name] = in_child(lambda copy=copy, resume=resume: start(copy, resume))
            after = [path.name for path in copy.rglob("*") if path.name.startswith(".") or is_lease(path.name)]
            answers[f"{name} leaves"] = after
        print(json.dumps({"start": base.name, "kill": number, "left": left, **answers}), flush=True)
    raise AssertionError("a start has fewer operations")


def main(base: Path) -> None:
    """Kills of a first start, then of a start that takes over what a killed one has left."""
    kill_at_each(base / "second", kill_at_each(base / "first", None))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
