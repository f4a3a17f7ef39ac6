"""Write a checkpoint so that at every moment the newest whole one can be found."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evatool.checkpoint import layout
from evatool.core.atomic_io import sync_folder
from evatool.core.errors import CheckpointError, EvatoolError, RunFolderTakenError
from evatool.core.secrets import holds_secrets
from evatool.distributed.collectives import gather_objects, rank, world_size
from evatool.distributed.engines.sharded_state import ShardedState

log = logging.getLogger(__name__)


def save_run(
    folder: Path,
    step: int,
    *,
    objective_state: ShardedState,
    optimizer_state: ShardedState,
    groups: Sequence[Mapping[str, Any]],
    train_state: Mapping[str, Any],
    model_config: Mapping[str, Any],
    resolved_toml: str,
    keep: int,
    keep_every_steps: int | None = None,
    check_owner: Callable[[], None] = lambda: None,
    group: Any = None,
) -> Path:
    """Write `folder/step_<step>` (see `layout`) and drop older ones; every rank must call it.

    Each rank writes the numbers it holds and nothing is gathered. Everything goes into a temporary folder, is flushed
    to the disk, and appears under its final name by one rename; the manifest is written last. Older checkpoints are
    removed only after that, so a crash at any point leaves the last whole one in place.

    Args:
        objective_state: the trained model's state (names with the prefix `model.`) and the rest.
        groups, train_state, model_config, resolved_toml: what the documents hold; only rank 0's are written.
        keep: newest checkpoints that stay.
        keep_every_steps: those at multiples of it stay for good.
        check_owner: called on rank 0 before it makes or removes anything; raises where another run has the folder.
        group: `collectives.side_group`, where a thread calls this beside the training.
    Returns: the checkpoint's folder.
    Raises: CheckpointError, the same on every rank, where the disk is full or cannot be written on any of them;
        earlier checkpoints are untouched. RunFolderTakenError, on every rank, as `check_owner` says.
    """
    final = layout.step_folder(folder, step)
    tensors = _tensor_files(objective_state, optimizer_state)
    part = folder / gather_objects(f".{final.name}.part-{uuid.uuid4().hex[:8]}", group)[0]
    try:
        with _same_on_all_ranks(final, group):
            if rank() == 0:
                check_owner()
                _create(folder, part, tensors)
        with _same_on_all_ranks(final, group):
            written = {n: layout.write_ranges(part / n, state, is_first=rank() == 0) for n, state in tensors.items()}
        writers = gather_objects(written, group)
        with _same_on_all_ranks(final, group):
            if rank() == 0:
                files = {n: _entry(state, [each[n] for each in writers]) for n, state in tensors.items()}
                documents = {layout.GROUPS: groups, layout.TRAIN_STATE: train_state, layout.MODEL_CONFIG: model_config}
                check_owner()
                _commit(part, final, step, files, documents, resolved_toml)
    except BaseException:
        if rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise
    if rank() == 0:
        _drop_old(folder, keep=keep, keep_every_steps=keep_every_steps, newest=step)
    return final


def _tensor_files(objective: ShardedState, optimizer: ShardedState) -> dict[str, ShardedState]:
    prefix, average = layout.MODEL_PREFIX, layout.AVERAGE_PREFIX
    model = objective.renamed({name: name.removeprefix(prefix) for name in objective.shapes if name.startswith(prefix)})
    rest = [name for name in objective.shapes if not name.startswith(prefix)]
    extra = objective.renamed({name: name for name in rest if not name.startswith(average)})
    averaged = objective.renamed({name: name.removeprefix(average) for name in rest if name.startswith(average)})
    files = {layout.MODEL: model, layout.EXTRA: extra, layout.AVERAGE: averaged, layout.OPTIMIZER: optimizer}
    return {name: state for name, state in files.items() if state.shapes or name in layout.ALWAYS_THERE}


def _create(folder: Path, part: Path, tensors: Mapping[str, ShardedState]) -> None:
    """The temporary folder with its tensor files at their final sizes; what crashes left behind goes first."""
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in layout.unfinished_in(folder):
        shutil.rmtree(left_over, ignore_errors=True)
    part.mkdir()
    for name, state in tensors.items():
        layout.create_tensor_file(part / name, state)


def _entry(state: ShardedState, writers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The manifest's line of a tensor file: its size, and who wrote what where."""
    return {"bytes": layout.TensorLayout(state).num_bytes, "writers": [w for w in writers if w["ranges"]]}


def _commit(
    part: Path,
    final: Path,
    step: int,
    files: dict[str, Any],
    documents: Mapping[str, Any],
    resolved_toml: str,
) -> None:
    """Write the documents and the manifest, flush, and give the folder its name."""
    for name, value in documents.items():
        files[name] = layout.write_json_entry(part / name, value)
    recipe = resolved_toml.encode()
    # Made first, so that one with credentials in it can be read by this user alone at every moment.
    (part / layout.RESOLVED).touch(mode=0o600 if holds_secrets(resolved_toml) else 0o666, exist_ok=False)
    written = layout.write_file(part / layout.RESOLVED, lambda file: file.write(recipe), mode="r+b")
    files[layout.RESOLVED] = layout.entry_of(written)
    layout.write_json_entry(part / layout.MANIFEST, {"format": layout.FORMAT_VERSION, "step": step, "files": files})
    sync_folder(part)
    _put_in_place(part, final)
    sync_folder(final.parent)


@contextmanager
def _same_on_all_ranks(final: Path, group: Any) -> Iterator[None]:
    """An OSError within the block, on any rank, becomes one CheckpointError on every rank; a folder that was taken over
    is told to every rank as well."""
    error: OSError | RunFolderTakenError | None = None
    try:
        yield
    except (OSError, RunFolderTakenError) as failure:
        error = failure
    failures = gather_objects(None if error is None else _save_error(error, final, rank()), group)
    first = next((failure for failure in failures if failure is not None), None)
    if first is not None:
        kind, what, details = first
        raise kind(what, **details) from error


def _put_in_place(part: Path, final: Path) -> None:
    """Rename; a folder already there is moved aside first (it was damaged, or the step was reached a second time)."""
    if not final.exists():
        os.replace(part, final)
        return
    aside = part.with_name(f"{part.name}-replaced")
    os.replace(final, aside)
    try:
        os.replace(part, final)
    except OSError:
        os.replace(aside, final)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _drop_old(folder: Path, *, keep: int, keep_every_steps: int | None, newest: int) -> None:
    """Remove all but the `keep` newest up to the one just written; a failure is only logged."""
    for step, path in layout.steps_in(folder)[::-1]:
        if step > newest:
            continue  # not older: a damaged one that a resume stepped over, or of another attempt
        keep -= 1
        if keep >= 0 or (keep_every_steps is not None and step % keep_every_steps == 0):
            continue
        try:
            # The manifest goes first: a half-removed checkpoint must not look whole.
            (path / layout.MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path)
        except OSError as error:
            log.warning("could not remove the old checkpoint %s: %s", path, error)


def _save_error(
    error: OSError | RunFolderTakenError, final: Path, writer: int
) -> tuple[type[EvatoolError], str, dict[str, str | None]]:
    """What an error of the ranks is made of, as plain values that travel between them."""
    if isinstance(error, RunFolderTakenError):
        return RunFolderTakenError, error.what, {"where": error.where, "expected": error.expected, "fix": error.fix}
    who = f" by rank {writer}" if world_size() > 1 else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        details = {
            "where": str(final.parent),
            "expected": "earlier checkpoints are intact",
            "fix": "free some space, or lower checkpoint.keep, then run the same command with --resume",
        }
        what = f"the disk is full: {final.name} could not be saved{who} ({error.strerror})"
        return CheckpointError, what, {**details}
    details = {
        "where": str(error.filename or final.parent),
        "expected": "a folder that can be written; earlier checkpoints are intact",
        "fix": "mend that, then run the same command with --resume",
    }
    return CheckpointError, f"{final.name} could not be saved{who}: {error.strerror or error}", {**details}
