"""Everything a resumed run needs besides weights and moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol

from torch import Tensor

from evatool.core.errors import CheckpointError
from evatool.core.param_group import ParamGroup
from evatool.distributed.engines.build import Engine


@dataclass
class TrainState:
    """How far a run has come. Plain values only: it is saved as JSON.

    Random numbers need no state: order, augmentation, masks and dropout follow from the seed and each sample's place.
    """

    seed: int = 0
    step: int = 0  # optimiser steps done, the skipped ones too
    samples_seen: int = 0
    position: int = 0  # the loader's
    data_order: str = ""  # the loader's name of the order of samples
    data_counts: dict[str, float] = field(default_factory=dict)  # bad samples and such of all ranks, as in the metrics
    skipped_steps: list[int] = field(default_factory=list)  # steps that were kept from the weights
    rollbacks: list[dict[str, Any]] = field(default_factory=list)  # from where to where, and what was jumped over
    recent_losses: list[float] = field(default_factory=list)  # what the spike gate compares with
    train_sec: float = 0.0  # wall-clock time in the loop, over all attempts
    draws_keyed_by: str = "rank"  # dropout: "sample", or (seed, step, rank) as in runs that were begun without this key
    notes: dict[str, str] = field(default_factory=dict)  # what the result should say, by topic

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    def add_skipped_step(self, step: int) -> None:
        """Count a step that was kept from the weights."""
        self.skipped_steps.append(step)

    def add_note(self, topic: str, text: str) -> None:
        """Have the result say something about the run; a topic has one note, the newest."""
        self.notes[topic] = text

    def drop_note(self, topic: str) -> None:
        """Take a note back, if there is one."""
        self.notes.pop(topic, None)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> TrainState:
        """Back from `to_json`; keys of later versions are ignored, absent ones keep their defaults."""
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in saved.items() if key in known})


class SavedRun(Protocol):
    """What a loaded checkpoint offers (`checkpoint.load.Checkpoint` is one)."""

    @property
    def objective_state(self) -> Mapping[str, Tensor]: ...

    @property
    def averaged_state(self) -> Mapping[str, Tensor]: ...

    @property
    def optimizer_state(self) -> Mapping[str, Tensor]: ...

    @property
    def groups(self) -> Sequence[Mapping[str, Any]]: ...

    @property
    def train_state(self) -> Mapping[str, Any]: ...


def describe_groups(groups: Sequence[ParamGroup]) -> list[dict[str, Any]]:
    """The group table as plain values, for `groups.json`."""
    return [
        {
            "name": group.name,
            "tower": group.tower,
            "layer": group.layer,
            "lr": group.lr,
            "lr_scale": group.lr_scale,
            "weight_decay": group.weight_decay,
            "parameters": list(group.param_names),
        }
        for group in groups
    ]


def resume_from(saved: SavedRun, engine: Engine, groups: Sequence[ParamGroup]) -> TrainState:
    """Put a checkpoint's weights and moments into the engine; every rank must call it.

    Returns: the state to go on from; the loader is to be built at its `position`.
    Raises: CheckpointError where the checkpoint is of another model or its parameter groups differ.
    """
    expected, found = describe_groups(groups), [dict(group) for group in saved.groups]
    if found != expected:
        names = {group["name"] for group in expected if group not in found}
        names |= {group["name"] for group in found if group not in expected}
        raise CheckpointError(
            f"the checkpoint's parameter groups differ from the recipe's: {', '.join(sorted(names)[:6])}",
            where="groups.json",
            expected="the same towers, learning rates, decay and parameters",
            fix="resume with the recipe that wrote it, or start a new run folder",
        )
    engine.load_model_state(saved.objective_state)
    engine.load_optimizer_state(saved.optimizer_state)
    return TrainState.from_json(saved.train_state)
