"""Answers on disk, compact: later intervals and comparisons need no second run, and a resumed run repeats nothing."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evatool.core.errors import DataError
from evatool.core.renamed_keys import PREDICTION_ARRAYS, rename
from evatool.eval.predictions import ClassificationResult, Predictions, RetrievalResult, ScoreResult
from evatool.eval.results import ModelRecord, SetRecord, file_name, write_atomically

LAYOUT = 2


@dataclass(frozen=True)
class Kept:
    """One model's answers on one set, and how they were come by.

    Attributes:
        key: digest of all that the answers depend on.
        settings: precision, resize, decode, prompts.
        seconds: that it took.
    """

    key: str
    model: ModelRecord
    set: SetRecord
    settings: dict[str, str]
    seconds: float
    answers: Predictions
    probes: ScoreResult | None = None


def prediction_path(run_dir: Path, model: str, set_name: str) -> Path:
    """Where a run folder keeps a model's answers on a set."""
    return run_dir / "predictions" / file_name(model) / f"{file_name(set_name)}.npz"


def write_predictions(path: Path, kept: Kept) -> None:
    """One compressed npz; complete or not there."""
    arrays, about = _to_arrays(kept.answers, "")
    if kept.probes is not None:
        more, about["probes"] = _to_arrays(kept.probes, "probe/")
        arrays |= more
    meta = {"layout": LAYOUT, "key": kept.key, "settings": kept.settings, "seconds": kept.seconds, "answers": about}
    meta |= {"model": asdict(kept.model), "set": asdict(kept.set)}
    arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_atomically(path, buffer.getvalue())


def read_predictions(path: Path) -> Kept:
    """What `write_predictions` wrote. Raises: DataError if the file is missing, damaged, or of an older evatool."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"kept answers cannot be read: {error}", where=str(path), fix="run evatool eval again"
        ) from error
    try:
        meta = json.loads(arrays.pop("meta").tobytes())
        if meta["layout"] != LAYOUT:
            raise KeyError("layout")
        about = meta["answers"]
        probes = about.pop("probes", None)
        read = _from_arrays(probes, arrays, "probe/") if probes else None
        return Kept(
            meta["key"],
            ModelRecord(**meta["model"]),
            SetRecord(**meta["set"]),
            meta["settings"],
            meta["seconds"],
            _from_arrays(about, arrays, ""),
            read if isinstance(read, ScoreResult) else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"kept answers have another layout: {error}",
            where=str(path),
            expected=f"layout {LAYOUT}",
            fix="run evatool eval again",
        ) from error


def _to_arrays(answers: Predictions, prefix: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    match answers:
        case ClassificationResult():
            small = np.min_scalar_type(answers.num_classes)
            arrays = {
                "labels": answers.labels.astype(small),
                "top": answers.top.astype(small),
                "rank": answers.rank.astype(small),
                "margin": answers.margin.astype(np.float16),
            }
            about: dict[str, Any] = {"kind": "classification", "num_classes": answers.num_classes}
        case RetrievalResult():
            arrays = {name: value.astype(np.int32) for name, value in vars(answers).items()}
            about = {"kind": "retrieval"}
        case ScoreResult():
            arrays = {metric: values.astype(np.float16) for metric, values in answers.scores.items()}
            about = {"kind": "scores", "chance": answers.chance}
    return {prefix + name: value for name, value in arrays.items()}, about


def _from_arrays(about: dict[str, Any], arrays: dict[str, NDArray[Any]], prefix: str) -> Predictions:
    match about["kind"]:
        case "classification":
            wide = {name: arrays[prefix + name].astype(np.int32) for name in ("labels", "top", "rank")}
            margin = arrays[prefix + "margin"].astype(np.float32)
            return ClassificationResult(**wide, num_classes=about["num_classes"], margin=margin)
        case "retrieval":
            known = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
            renamed = rename(known, PREDICTION_ARRAYS, "kept predictions")
            return RetrievalResult(**{name: renamed[name] for name in RetrievalResult.__dataclass_fields__})
        case "scores":
            chance = about["chance"]
            return ScoreResult({name: arrays[prefix + name].astype(np.float32) for name in chance}, chance)
        case kind:
            raise ValueError(f"answers of kind {kind!r}")
