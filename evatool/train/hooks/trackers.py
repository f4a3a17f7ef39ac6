"""The figures of a run in TensorBoard, Weights & Biases or trackio."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evatool.core.errors import DependencyError
from evatool.distributed.collectives import rank
from evatool.train.control import StepResult, TrainerControl
from evatool.train.hooks.base import Hook

MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


class Tracker(Hook):
    """Hands the metrics of each logged step to one of the three; on rank 0 only.

    Args:
        kind: "tensorboard" (files below `folder`), "wandb" or "trackio" (their own environment variables say where).
        folder: the run folder.
        name: of the run.
        settings: shown with it: the recipe, flat.
    Raises: DependencyError, before anything is trained, where its package is missing.
    """

    def __init__(self, kind: str, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        self._kind, self._folder, self._name = kind, folder, name
        self._settings = {key: str(value) for key, value in settings.items()}
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
                # The folder is the run's own, so a resumed run goes on in the same place.
                run = self._module.init(
                    project="evatool",
                    name=self._name,
                    id=_id_of(self._folder),
                    resume="allow",
                    dir=str(self._folder),
                    config=self._settings,
                )
            case _:
                run = self._module.init(
                    project="evatool", name=_id_of(self._folder), resume="allow", config=self._settings
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


def _id_of(folder: Path) -> str:
    """A run's identity: the same for every start in one folder."""
    parts = folder.resolve().parts[-3:]
    return "-".join(part for part in parts if part not in ("/", ""))
