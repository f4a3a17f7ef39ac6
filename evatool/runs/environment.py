"""`environment.json` of a run folder: the versions, commit, machine and command line that a run was started with."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import evatool
from evatool.core.bounded_json import read_json
from evatool.core.secrets import mask_arguments

log = logging.getLogger(__name__)

_PACKAGES = (
    *("torch", "torchvision", "timm", "open_clip_torch", "webdataset", "deepspeed", "clip-benchmark"),
    *("numpy", "pillow", "safetensors", "pydantic", "typer", "rich"),
)


def environment(command: Sequence[str]) -> dict[str, Any]:
    """Versions, git commit, world size and command line of this process, whose credentials are hidden."""
    return {
        "command": mask_arguments(command),
        "evatool": evatool.__version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "packages": {name: _version(name) for name in _PACKAGES},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Commit of the source tree evatool runs from, `+dirty` with uncommitted changes; None for an installed wheel."""
    root = Path(evatool.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+dirty" if changes.stdout.strip() else "")


def warn_of_other_versions(before: Path) -> None:
    """Say so where a resumed run started with another Python or other packages: its numbers may differ a little."""
    try:
        old = read_json(before)
        packages = old["packages"] | {"python": old["python"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # a new run, or one that was killed before it could write this
    now = {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()}
    changed = [name for name in now if packages.get(name, now[name]) != now[name]]
    differing = [f"{name} {packages[name]}, now {now[name]}" for name in changed]
    if differing:
        log.warning("this run was started with other versions: %s", "; ".join(differing))
