"""Find the newest whole checkpoint and read it; never opens anything that could run code."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from evatool.checkpoint import layout
from evatool.core.bounded_json import read_json
from evatool.core.errors import CheckpointError
from evatool.formats.safetensors import SafetensorsMap, TensorMap

log = logging.getLogger(__name__)

_LATEST_SEEN_SEC = 60.0
"""A checkpoint that another machine has found is missing after this: NFS may remember so long what was not there."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk. Tensors are read when they are asked for, whole or in part."""

    path: Path
    step: int
    objective_state: Mapping[str, Tensor]  # the objective's `state_dict()`
    averaged_state: Mapping[str, Tensor]  # the moving average, `ema.model.<name>`; empty where none was kept
    optimizer_state: Mapping[str, Tensor]
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
        for writer in entry.get("writers", [entry]):
            if layout.sha256_of(path, writer.get("ranges")) != writer["sha256"]:
                raise CheckpointError(
                    f"{name} is damaged: its SHA-256 differs from the manifest's", where=str(path), fix=_RESTORE
                )


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """MANIFEST.json as written. Raises: CheckpointError if it is missing, damaged or of a later format."""
    path = checkpoint / layout.MANIFEST
    manifest = _read_json(path)
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise CheckpointError(f"{layout.MANIFEST} is not a checkpoint's manifest", where=str(path), fix=_RESTORE)
    if manifest["format"] not in layout.READABLE_FORMATS:
        raise CheckpointError(
            f"checkpoint format {manifest['format']!r} is not known to this version of evatool",
            where=str(path),
            expected=f"format {' or '.join(map(str, layout.READABLE_FORMATS))}",
            fix="use the version of evatool that wrote it",
        )
    if not _lists_files(manifest):
        raise CheckpointError(f"{layout.MANIFEST} does not list a checkpoint's files", where=str(path), fix=_RESTORE)
    return manifest


def _lists_files(manifest: dict[str, Any]) -> bool:
    files = manifest.get("files")
    if not isinstance(manifest.get("step"), int) or not isinstance(files, dict):
        return False
    entries_are_fine = all(_is_entry(entry) for entry in files.values())
    # Only files of this folder, and at least those that every checkpoint has.
    return entries_are_fine and all(Path(name).name == name for name in files) and set(files) >= layout.ALWAYS_THERE


def _is_entry(entry: Any) -> bool:
    """A size and one SHA-256, or those of writers whose ranges cover the file once."""
    if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int):
        return False
    if "writers" not in entry:
        return isinstance(entry.get("sha256"), str)
    try:
        ranges = sorted((start, end) for writer in entry["writers"] for start, end in writer["ranges"])
        has_hashes = all(isinstance(writer["sha256"], str) for writer in entry["writers"])
    except (TypeError, KeyError, ValueError):
        return False
    ends = [0, *(end for _, end in ranges)]
    return has_hashes and [start for start, _ in ranges] == ends[:-1] and ends[-1] == entry["bytes"]


def load_checkpoint(checkpoint: Path, *, is_verified: bool = False) -> Checkpoint:
    """A checkpoint, its tensors still on the disk. Raises: CheckpointError.

    Args:
        is_verified: `verify` (or `latest_checkpoint`) has just found it whole, on this rank or another. It is then
            waited for: a shared disk may show it to this machine later.
    """
    if is_verified:
        _wait_until_seen(checkpoint)
    else:
        verify(checkpoint)
    objective = {layout.MODEL_PREFIX: _open_tensors(checkpoint / layout.MODEL)}
    if (checkpoint / layout.EXTRA).exists():
        objective[""] = _open_tensors(checkpoint / layout.EXTRA)
    has_average = (checkpoint / layout.AVERAGE).exists()
    average = {layout.AVERAGE_PREFIX: _open_tensors(checkpoint / layout.AVERAGE)} if has_average else {}
    return Checkpoint(
        path=checkpoint,
        step=read_manifest(checkpoint)["step"],
        objective_state=_Prefixed(objective),
        averaged_state=_Prefixed(average),
        optimizer_state=_open_tensors(checkpoint / layout.OPTIMIZER),
        groups=_read_json(checkpoint / layout.GROUPS),
        train_state=_read_json(checkpoint / layout.TRAIN_STATE),
        model_config=_read_json(checkpoint / layout.MODEL_CONFIG),
    )


def read_model(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The trained model's weights by its own names, and its configuration; both checked against the manifest.

    Raises: CheckpointError.
    """
    verify(checkpoint)
    return dict(_open_tensors(checkpoint / layout.MODEL)), _read_json(checkpoint / layout.MODEL_CONFIG)


_RESTORE = "use an earlier checkpoint, or restore this one from a copy"


def _wait_until_seen(checkpoint: Path) -> None:
    """Until the checkpoint is there, which it is as a whole, or the time is over; what is missing then is an error."""
    deadline = time.monotonic() + _LATEST_SEEN_SEC
    while not (checkpoint / layout.MANIFEST).is_file() and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            os.listdir(checkpoint.parent)  # NFS looks at its server again
        time.sleep(0.1)


class _Prefixed(TensorMap):
    """The tensors of several files as one mapping, the names of each with a prefix."""

    def __init__(self, files: Mapping[str, SafetensorsMap]) -> None:
        self._home = {f"{prefix}{name}": (file, name) for prefix, file in files.items() for name in file}

    def __getitem__(self, name: str) -> Tensor:
        file, own = self._home[name]
        return file[own]

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape from the header."""
        file, own = self._home[name]
        return file.shape(own)

    def piece(self, name: str, start: int, numel: int) -> Tensor:
        """Numbers [start, start + numel) of the flat tensor; only they are read."""
        file, own = self._home[name]
        return file.piece(own, start, numel)


def _open_tensors(path: Path) -> SafetensorsMap:
    try:
        return SafetensorsMap(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.what}", where=str(path), fix=_RESTORE) from error
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}", where=str(path), fix=_RESTORE) from error


def _read_json(path: Path) -> Any:
    try:
        value: Mapping[str, Any] | list[Any] = read_json(path, 256 * 2**20, memory_per_byte=20)
    except (OSError, ValueError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise CheckpointError(f"{path.name} {reason}", where=str(path.parent), fix=_RESTORE) from error
    return value
