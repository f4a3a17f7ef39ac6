"""Costs of a model for which there is no formula: another process builds it without memory and counts. No torch here.

The process (`evatool.teachers.trace`) takes several seconds, so its figures are kept in the user's cache folder
(`core.own_folder`) below `costs`, one file for each model, layer, input size and version of timm and torch; a second
plan starts no process.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from evatool.core.atomic_io import write_bytes_atomically
from evatool.core.errors import RecipeError
from evatool.core.own_folder import user_cache_folder

log = logging.getLogger(__name__)

TRACER = "evatool.teachers.trace"
"""Module of the process that counts."""


@dataclass(frozen=True)
class TracedModel:
    """What was counted of one image model that gives a grid of patch features.

    Attributes:
        flops: operations of one picture's forward pass, up to the layer that is asked for.
        params: all parameters.
        working_numbers: most numbers that a forward pass holds at once for a picture, weights left out.
        num_patches, embed_dim: rows times columns of the grid, and channels of the features.
    """

    name: str
    flops: int
    params: int
    working_numbers: int
    num_patches: int
    embed_dim: int


def traced_timm_model(name: str, layer: int | None, image_size: int | None) -> TracedModel:
    """The costs of a timm model as a teacher of patch features, from the cache or from a process that counts them.

    Args:
        name: as `timm.create_model` takes it.
        layer, image_size: as in the recipe's `[teacher]`; the last layer and the model's own size when None.
    Raises: RecipeError where torch or timm cannot build or run the model without memory.
    """
    path = cache_file(name, layer, image_size)
    found = None if path is None else _cached(path)
    if found is None:
        found = _traced(name, layer, image_size)
        if path is not None:
            _keep(path, found)
    return found


def cache_file(name: str, layer: int | None, image_size: int | None) -> Path | None:
    """Where the figures of a model are kept; None where nothing can be kept."""
    versions = [metadata.version(package) for package in ("timm", "torch")]
    key = hashlib.sha256(json.dumps([name, layer, image_size, *versions]).encode()).hexdigest()[:16]
    folder = user_cache_folder()
    return None if folder is None else folder / "costs" / f"{name.replace('/', '-')}-{key}.json"


def _keep(path: Path, found: TracedModel) -> None:
    try:
        write_bytes_atomically(path, (json.dumps(asdict(found), indent=1) + "\n").encode(), make_parents=True)
    except OSError as error:
        log.warning("%s could not be written: %s; the teacher is counted again next time", path, error)


def _cached(path: Path) -> TracedModel | None:
    """None where there is no file, or one that cannot be read."""
    try:
        return TracedModel(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _traced(name: str, layer: int | None, image_size: int | None) -> TracedModel:
    log.info("timm's %s has no formula: a process counts what it costs, and the figures are kept", name)
    command = [sys.executable, "-m", TRACER, json.dumps([name, layer, image_size])]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}  # nothing of the working folder is imported
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    last = (ran.stdout.strip().splitlines() or [""])[-1]
    try:
        reply = json.loads(last)
    except ValueError:
        message = (ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"])[-1]
        reply = {"error": message}
    if "error" in reply:
        raise RecipeError(
            f"what the teacher timm/{name} costs cannot be counted: {reply['error']}",
            where="teacher.model, teacher.layer and teacher.image_size",
            expected="a model that timm builds on torch's meta device and that gives patch features",
            fix="correct these keys; `timm.list_models()` shows the names",
        )
    return TracedModel(**reply)
