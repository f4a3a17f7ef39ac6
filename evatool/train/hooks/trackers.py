"""The figures of a run in TensorBoard, Weights & Biases or trackio."""

from __future__ import annotations

import importlib
import math
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evatool.core.atomic_io import write_json_atomically
from evatool.core.bounded_json import read_json
from evatool.core.errors import DependencyError
from evatool.core.secrets import mask_values
from evatool.distributed.collectives import rank
from evatool.train.control import StepResult, TrainerControl
from evatool.train.hooks.base import Hook

DEFAULT_PROJECT = "evatool"
IDENTITY = "tracker.json"
"""File of a run folder: the run's identity in each tracker that needs one."""
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


class Tracker(Hook):
    """Hands the metrics of each logged step to one of the three; on rank 0 only.

    Args:
        kind: "tensorboard" (files below `folder`), "wandb" or "trackio" (their own environment variables say where).
        folder: the run folder.
        name: of the run.
        settings: shown with it: the recipe, flat; credentials are hidden.
        project, entity, group, run_id: as the recipe's `[train.tracking]` has them; each None is left to W&B's
            environment variables, then to the default.
    Raises: DependencyError, before anything is trained, where its package is missing.
    """

    def __init__(
        self,
        kind: str,
        folder: Path,
        name: str,
        settings: Mapping[str, Any],
        *,
        project: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        run_id: str | None = None,
    ) -> None:
        self._kind, self._folder, self._name = kind, folder, name
        self._settings = {key: str(mask_values(value, key)) for key, value in settings.items()}
        self._project, self._entity, self._group, self._asked_id = project, entity, group, run_id
        self._module, self._run = _module(kind), None

    def at_start(self, trainer: TrainerControl) -> None:
        if rank() != 0:
            return
        run: Any
        match self._kind:
            case "tensorboard":
                # Points of steps that the checkpoint does not have are dropped.
                folder = str(self._folder / "tensorboard")
                run = self._module.SummaryWriter(folder, purge_step=trainer.state.step + 1)
            case "wandb":
                # What is None is W&B's to choose, by its environment variables.
                run = self._module.init(
                    project=self._project or _default("WANDB_PROJECT", DEFAULT_PROJECT),
                    entity=self._entity,
                    group=self._group,
                    name=_default("WANDB_NAME", self._name),
                    id=self._id(os.environ.get("WANDB_RUN_ID")),
                    resume=_default("WANDB_RESUME", "allow"),
                    dir=_default("WANDB_DIR", str(self._folder)),
                    config=self._settings,
                )
            case _:
                run = self._module.init(
                    project=self._project or DEFAULT_PROJECT,
                    group=self._group,
                    name=self._id(None),
                    resume="allow",
                    config=self._settings,
                )
        self._run = run

    def after_step(self, result: StepResult, trainer: TrainerControl) -> None:
        if self._run is None or not result.is_logged:
            return
        finite = {key: value for key, value in result.metrics.items() if math.isfinite(value)}
        match self._kind:
            case "tensorboard":
                for key, value in finite.items():
                    self._run.add_scalar(key, value, result.step)
            case "wandb":
                self._run.log(finite, step=result.step)
            case _:
                self._module.log(finite, step=result.step)

    def _id(self, of_environment: str | None) -> str:
        """The run's identity: the recipe's, the environment's, the one of its earlier starts, else a new one.

        The first one it had is kept in the run folder, which is its own: no two runs share one.
        """
        asked = self._asked_id or of_environment
        path = self._folder / IDENTITY
        try:
            kept = read_json(path)
        except (OSError, ValueError):
            kept = {}
        known = kept.get(self._kind) if isinstance(kept, dict) else None
        if isinstance(known, str) and known:
            return asked or known
        found = asked or _id_of_older_run(self._folder, self._kind) or _new_id(self._name)
        write_json_atomically(path, (kept if isinstance(kept, dict) else {}) | {self._kind: found})
        return found

    def close(self) -> None:
        if self._run is None:
            return
        if self._kind == "tensorboard":
            self._run.close()
        else:
            (self._run if self._kind == "wandb" else self._module).finish()
        self._run = None


def _module(kind: str) -> Any:
    try:
        return importlib.import_module(MODULES[kind])
    except ImportError as error:
        raise DependencyError(
            f"train.trackers names {kind}, which is not installed: {error}",
            fix="pip install 'evatool[track]', or take it out of train.trackers",
        ) from error


def _default(variable: str, value: str) -> str | None:
    """The value, unless an environment variable of W&B stands for it, which W&B reads itself."""
    return None if os.environ.get(variable) else value


def _new_id(name: str) -> str:
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', name)[:64]}-{uuid.uuid4().hex[:12]}"


def _id_of_older_run(folder: Path, kind: str) -> str | None:
    """The identity of a run that began before identities were kept: W&B's own files tell it, else the folder's place.

    None for a run that begins now, or has had no such tracker until now.
    """
    runs = sorted(path.name for path in folder.glob("wandb/*run-*")) if kind == "wandb" else []
    named = [found[1] for name in runs if (found := re.fullmatch(r"(?:offline-)?run-\d{8}_\d{6}-(.+)", name))]
    if named:
        return named[-1]
    for recipe in folder.glob("checkpoints/step_*/resolved.toml"):
        if re.search(rf'^trackers = \[[^]]*"{kind}"', recipe.read_text(encoding="utf-8"), re.MULTILINE):
            parts = folder.resolve().parts[-3:]
            return "-".join(part for part in parts if part not in ("/", ""))
    return None
