"""Predictions on disk, compact: intervals and comparisons need no second run, a resumed run repeats nothing."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evatool.core.atomic_io import write_bytes_atomically
from evatool.core.errors import DataError
from evatool.eval.predictions import Predictions
from evatool.eval.results import ModelRecord, SetRecord, file_name
from evatool.eval.tasks.base import EvalTask
from evatool.eval.tasks.build import result_of

LAYOUT = 2
_PROBE = "probe/"  # before the names of the arrays of probes


@dataclass(frozen=True)
class KeptPredictions:
    """One model's predictions on one set, and how they were made.

    Attributes:
        key: digest of all that the predictions depend on.
        settings: precision, resize, decode, prompts.
        seconds: wall time that they took.
        probes: scores of classifiers fitted on the set's training data, where there are any.
    """

    key: str
    model: ModelRecord
    set: SetRecord
    settings: dict[str, str]
    seconds: float
    predictions: Predictions
    probes: Predictions | None = None


def prediction_path(run_dir: Path, model: str, set_name: str) -> Path:
    """Path of a model's predictions on a set in a run folder."""
    return run_dir / "predictions" / file_name(model) / f"{file_name(set_name)}.npz"


def write_predictions(path: Path, kept: KeptPredictions) -> None:
    """One compressed npz; complete or not there."""
    arrays, about = _stored(kept.predictions, "")
    if kept.probes is not None:
        more, about["probes"] = _stored(kept.probes, _PROBE)
        arrays |= more
    meta = {"layout": LAYOUT, "key": kept.key, "settings": kept.settings, "seconds": kept.seconds, "answers": about}
    meta |= {"model": asdict(kept.model), "set": asdict(kept.set)}
    arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_bytes_atomically(path, buffer.getvalue(), make_parents=True)


def read_predictions(path: Path, own: Sequence[EvalTask[Any]] = ()) -> KeptPredictions:
    """Read back what `write_predictions` wrote.

    Args:
        own: tasks from outside the package whose predictions have a layout of their own.
    Raises: DataError if the file is missing, damaged, of an older layout, or of one that no task has.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"kept predictions cannot be read: {error}", where=str(path), fix="run evatool eval again"
        ) from error
    try:
        meta = json.loads(arrays.pop("meta").tobytes())
        if meta["layout"] != LAYOUT:
            raise KeyError("layout")
        about = meta["answers"]
        probes = about.pop("probes", None)
        return KeptPredictions(
            meta["key"],
            ModelRecord(**meta["model"]),
            SetRecord(**meta["set"]),
            meta["settings"],
            meta["seconds"],
            _restored(about, arrays, "", own),
            _restored(probes, arrays, _PROBE, own) if probes else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"kept predictions have another layout: {error}",
            where=str(path),
            expected=f"layout {LAYOUT}",
            fix="run evatool eval again",
        ) from error


def _stored(predictions: Predictions, prefix: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Arrays under prefixed names, and the entry that says how to read them."""
    arrays, about = predictions.to_arrays()
    return {prefix + name: value for name, value in arrays.items()}, {"kind": predictions.layout, **about}


def _restored(
    about: dict[str, Any], arrays: dict[str, NDArray[Any]], prefix: str, own: Sequence[EvalTask[Any]]
) -> Predictions:
    """Predictions from their arrays. Raises: ValueError where no task has predictions of their layout."""
    named = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    return result_of(about["kind"], own).from_arrays(named, about)
