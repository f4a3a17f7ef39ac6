"""The table of evaluation kinds: the one place where a kind is chosen by its name. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from evatool.eval.predictions import Predictions
from evatool.eval.tasks.base import EvalTask
from evatool.eval.tasks.localization import Localization
from evatool.eval.tasks.probes import Probes
from evatool.eval.tasks.retrieval import Retrieval
from evatool.eval.tasks.zero_shot import ZeroShotClassification

SetKind = Literal["classification", "retrieval", "localisation"]
"""Kinds that a suite's sets can have."""
_KINDS = (*get_args(SetKind), "probes")


def find_task(kind: str, own: Sequence[EvalTask[Any]] = ()) -> EvalTask[Any] | None:
    """The task of a kind; None where neither the package nor `own` has one.

    Args:
        own: tasks from outside the package, which come first.
    """
    given = next((task for task in own if task.kind == kind), None)
    if given is not None:
        return given
    match kind:
        case "classification":
            return ZeroShotClassification()
        case "retrieval":
            return Retrieval()
        case "localisation":
            return Localization()
        case "probes":
            return Probes()
        case _:
            return None


def task_of(kind: str, own: Sequence[EvalTask[Any]] = ()) -> EvalTask[Any]:
    """The task of a kind that must exist, as `find_task`. Raises: ValueError where there is none."""
    task = find_task(kind, own)
    if task is None:
        raise ValueError(f"no evaluation task of kind {kind!r}; give it as one of your own tasks")
    return task


def all_tasks() -> list[EvalTask[Any]]:
    """One task of every kind of the package."""
    return [task_of(kind) for kind in _KINDS]


def result_of(layout: str, own: Sequence[EvalTask[Any]] = ()) -> type[Predictions]:
    """The class of predictions that are stored in a layout. Raises: ValueError where no task has such predictions."""
    for task in (*own, *all_tasks()):
        if task.result.layout == layout:
            return task.result
    raise ValueError(f"predictions of layout {layout!r}")
