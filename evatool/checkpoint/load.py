"""Find the newest whole checkpoint and read it; never opens anything that could run code."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from evatool.checkpoint import layout
from evatool.errors import CheckpointError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory."""

    path: Path
    step: int
    objective_state: dict[str, Tensor]  # the objective's `state_dict()`
    optimizer_state: dict[str, Tensor]
    groups: list[dict[str, Any]]
    train_state: dict[str, Any]
    model_config: dict[str, Any]


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run folder (or of its `checkpoints` folder); None if it has none at all.

    Damaged ones are named in a warning and passed over.
    Raises: CheckpointError where there are checkpoints but every one is damaged.
    """
    folder = run_dir / "checkpoints" if (run_dir / "checkpoints").is_dir() else run_dir
    found = layout.steps_in(folder)
    damage: list[str] = []
    for _, path in reversed(found):
        try:
            verify(path)
        except CheckpointError as error:
            damage.append(f"{path.name}: {error.what}")
            log.warning("checkpoint passed over: %s: %s", path, error.what)
        else:
            return path
    if found:
        raise CheckpointError(
            f"all {len(found)} checkpoints are damaged: {'; '.join(damage)}",
            where=str(folder),
            fix="restore one from a copy, or start a new run folder",
        )
    return None


def verify(checkpoint: Path) -> None:
    """Compare every file with the manifest: presence, size, SHA-256.

    Raises: CheckpointError naming the first file that is missing or differs.
    """
    files = read_manifest(checkpoint)["files"]
    for name, entry in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{name} is missing", where=str(checkpoint), fix=_RESTORE)
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(
                f"{name} has {size} bytes", where=str(path), expected=f"{entry['bytes']} bytes", fix=_RESTORE
            )
        if layout.sha256_of(path) != entry["sha256"]:
            raise CheckpointError(
                f"{name} is damaged: its SHA-256 differs from the manifest's", where=str(path), fix=_RESTORE
            )


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """MANIFEST.json as written. Raises: CheckpointError if it is missing, damaged or of a later format."""
    path = checkpoint / layout.MANIFEST
    manifest = _read_json(path)
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise CheckpointError(f"{layout.MANIFEST} is not a checkpoint's manifest", where=str(path), fix=_RESTORE)
    if manifest["format"] != layout.FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint format {manifest['format']!r} is not known to this version of evatool",
            where=str(path),
            expected=f"format {layout.FORMAT_VERSION}",
            fix="use the version of evatool that wrote it",
        )
    if not _lists_files(manifest):
        raise CheckpointError(f"{layout.MANIFEST} does not list a checkpoint's files", where=str(path), fix=_RESTORE)
    return manifest


def _lists_files(manifest: dict[str, Any]) -> bool:
    files = manifest.get("files")
    if not isinstance(manifest.get("step"), int) or not isinstance(files, dict):
        return False
    entries_are_fine = all(isinstance(entry, dict) and {"bytes", "sha256"} <= set(entry) for entry in files.values())
    # Only files of this folder, and at least those that every checkpoint has.
    return entries_are_fine and all(Path(name).name == name for name in files) and set(files) >= layout.ALWAYS_THERE


def load_checkpoint(checkpoint: Path) -> Checkpoint:
    """All of a checkpoint, after `verify`. Raises: CheckpointError."""
    verify(checkpoint)
    prefix = layout.MODEL_PREFIX
    state = {f"{prefix}{name}": tensor for name, tensor in _read_tensors(checkpoint / layout.MODEL).items()}
    if (checkpoint / layout.EXTRA).exists():
        state |= _read_tensors(checkpoint / layout.EXTRA)
    return Checkpoint(
        path=checkpoint,
        step=read_manifest(checkpoint)["step"],
        objective_state=state,
        optimizer_state=_read_tensors(checkpoint / layout.OPTIMIZER),
        groups=_read_json(checkpoint / layout.GROUPS),
        train_state=_read_json(checkpoint / layout.TRAIN_STATE),
        model_config=_read_json(checkpoint / layout.MODEL_CONFIG),
    )


def read_model(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The trained model's weights by its own names, and its configuration; both checked against the manifest.

    Raises: CheckpointError.
    """
    verify(checkpoint)
    return _read_tensors(checkpoint / layout.MODEL), _read_json(checkpoint / layout.MODEL_CONFIG)


_RESTORE = "use an earlier checkpoint, or restore this one from a copy"


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}", where=str(path), fix=_RESTORE) from error


def _read_json(path: Path) -> Any:
    try:
        value: Mapping[str, Any] | list[Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise CheckpointError(f"{path.name} {reason}", where=str(path.parent), fix=_RESTORE) from error
    return value
