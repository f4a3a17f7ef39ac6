"""Real small disks for tests: a command in a mount namespace of its own, with a tmpfs of a few kilobytes somewhere."""

from __future__ import annotations

import functools
import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest


@functools.cache
def _can_mount() -> bool:
    try:
        done = subprocess.run(
            ["unshare", "-Urm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, timeout=20
        )
    except OSError:
        return False
    return done.returncode == 0


def need_small_disks() -> None:
    """Skip a test where this user may not mount a tmpfs."""
    if not _can_mount():
        pytest.skip("this user may not make a mount namespace (unshare -Urm mount -t tmpfs)")


def run_on_small_disk(
    command: Sequence[object], folder: Path, size: str, *, after: str = "true", **settings: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command where `folder` is a tmpfs of this size, seen by the command and its children only.

    Args:
        after: shell lines run there at the end, to copy out what is left; the exit status stays the command's.
        settings: of `subprocess.run`.
    """
    lines = f"mount -t tmpfs -o size={size} none {shlex.quote(str(folder))} || exit 99\n"
    lines += shlex.join(map(str, command)) + "\ncode=$?\n" + after + "\nexit $code\n"
    given = {"capture_output": True, "text": True, "timeout": 300, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    return subprocess.run(["unshare", "-Urm", "sh", "-c", lines], **(given | settings))
