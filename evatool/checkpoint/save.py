"""Write a checkpoint so that at every moment the newest whole one can be found."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from evatool.checkpoint import layout
from evatool.errors import CheckpointError

log = logging.getLogger(__name__)


def save_run(
    folder: Path,
    step: int,
    *,
    objective_state: Mapping[str, Tensor],
    optimizer_state: Mapping[str, Tensor],
    groups: Sequence[Mapping[str, Any]],
    train_state: Mapping[str, Any],
    model_config: Mapping[str, Any],
    resolved_toml: str,
    keep: int,
) -> Path:
    """`save_checkpoint` with the objective's state divided into the trained model's and the rest."""
    prefix = layout.MODEL_PREFIX
    return save_checkpoint(
        folder,
        step,
        model_state={k.removeprefix(prefix): v for k, v in objective_state.items() if k.startswith(prefix)},
        extra_state={k: v for k, v in objective_state.items() if not k.startswith(prefix)},
        optimizer_state=optimizer_state,
        groups=groups,
        train_state=train_state,
        model_config=model_config,
        resolved_toml=resolved_toml,
        keep=keep,
    )


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    model_state: Mapping[str, Tensor],
    extra_state: Mapping[str, Tensor],
    optimizer_state: Mapping[str, Tensor],
    groups: Sequence[Mapping[str, Any]],
    train_state: Mapping[str, Any],
    model_config: Mapping[str, Any],
    resolved_toml: str,
    keep: int,
) -> Path:
    """Write `folder/step_<step>` (see `layout`) and drop all but the newest `keep`; one process calls it.

    Everything goes into a temporary folder, is flushed to the disk, and appears under its final name by one rename; the
    manifest is written last. Older checkpoints are removed only after that, so a crash at any point leaves the last
    whole one in place.

    Returns: the checkpoint's folder.
    Raises: CheckpointError where the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    final = layout.step_folder(folder, step)
    part = folder / f".{final.name}.part-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in layout.unfinished_in(folder):
            shutil.rmtree(left_over, ignore_errors=True)
        part.mkdir()
        files = {layout.MODEL: layout.write_tensors(part / layout.MODEL, model_state)}
        if extra_state:
            files[layout.EXTRA] = layout.write_tensors(part / layout.EXTRA, extra_state)
        files[layout.OPTIMIZER] = layout.write_tensors(part / layout.OPTIMIZER, optimizer_state)
        documents = {layout.GROUPS: groups, layout.TRAIN_STATE: train_state, layout.MODEL_CONFIG: model_config}
        for name, value in documents.items():
            files[name] = layout.write_json(part / name, value)
        recipe = resolved_toml.encode()
        files[layout.RESOLVED] = layout.write_file(part / layout.RESOLVED, lambda file: file.write(recipe))
        layout.write_json(part / layout.MANIFEST, {"format": layout.FORMAT_VERSION, "step": step, "files": files})
        layout.sync_folder(part)
        _put_in_place(part, final)
        layout.sync_folder(folder)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise _save_error(error, final) from error
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    _drop_old(folder, keep=keep, newest=step)
    return final


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


def _drop_old(folder: Path, *, keep: int, newest: int) -> None:
    """Remove all but the `keep` newest up to the one just written; a failure is only logged."""
    for step, path in layout.steps_in(folder)[::-1]:
        if step > newest:
            continue  # not older: a damaged one that a resume stepped over, or of another attempt
        keep -= 1
        if keep >= 0:
            continue
        try:
            # The manifest goes first: a half-removed checkpoint must not look whole.
            (path / layout.MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path)
        except OSError as error:
            log.warning("could not remove the old checkpoint %s: %s", path, error)


def _save_error(error: OSError, final: Path) -> CheckpointError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f"the disk is full: {final.name} could not be saved ({error.strerror})",
            where=str(final.parent),
            expected="earlier checkpoints are intact",
            fix="free some space, or lower checkpoint.keep, then run the same command with --resume",
        )
    return CheckpointError(
        f"{final.name} could not be saved: {error.strerror or error}",
        where=str(error.filename or final.parent),
        expected="a folder that can be written; earlier checkpoints are intact",
        fix="mend that, then run the same command with --resume",
    )
