"""One loaded model on one opened set, for tasks of this package and tasks from outside it, without a recipe."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from evatool.eval.encode import ClipModel, Encoding, Tokenizer
from evatool.eval.encoder import EvaluationSet, SetEncoder
from evatool.eval.prediction_store import KeptPredictions
from evatool.eval.predictions import Predictions
from evatool.eval.result_rows import result_rows
from evatool.eval.results import EvalResults, ModelRecord, SetRecord
from evatool.eval.tasks.base import EvalTask
from evatool.eval.text_classifier import prompts_hash


@dataclass(frozen=True)
class SetEvaluation:
    """The predictions and the results of one model on one set.

    Attributes:
        kept: the predictions, as `write_predictions` stores them.
        results: every metric with its interval, as `write_results` and `write_eval_report` take them.
    """

    kept: KeptPredictions
    results: EvalResults


def evaluate(
    model: ClipModel,
    task: EvalTask[Any],
    eval_set: EvaluationSet,
    *,
    tokenizer: Tokenizer | None = None,
    how: Encoding | None = None,
    model_record: ModelRecord | None = None,
    title: str | None = None,
    settings: dict[str, str] | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> SetEvaluation:
    """Predict a set and measure the predictions; every rank of a job must call it and gets the same.

    Args:
        model: what `evatool.load_clip` returns, or anything with its two encoders.
        tokenizer: texts to tokens (T, L) int64; the model's own when absent.
        how: device, trimming of texts, lockstep; the model's device when absent.
        model_record: how results name the model; "model", without a fingerprint, when absent.
        title: of the set in reports; its name when absent.
        settings: precision, resize and decode that the images and the model have, for the results.
        num_bootstrap, seed: resamples behind each 95 % interval, and their seed.
        on_batch: called with the number of samples after each batch.
    Raises: DataError or NumericalError as the task.
    """
    started = time.perf_counter()
    record = model_record or ModelRecord("model", source="", fingerprint="", image_size=0, num_parameters=0)
    encoder = SetEncoder(
        model,
        tokenizer or model.tokenizer,  # type: ignore[attr-defined]
        how or Encoding(device=str(getattr(model, "device", "cpu"))),
        name=record.name,
        patch_tokens=getattr(model, "visual_tokens", None),
        on_batch=on_batch,
    )
    predictions = task.run(encoder, eval_set).predictions
    classnames = list(eval_set.classnames or [])
    found = {"precision": record.precision, "resize": "", "decode": ""} | (settings or {})
    found["prompts"] = prompts_hash(classnames, list(eval_set.templates or [])) if classnames else ""
    set_record = _set_record(task, eval_set, predictions, title or eval_set.name)
    seconds = round(time.perf_counter() - started, 3)
    kept = KeptPredictions("", record, set_record, found, seconds, predictions)
    results = EvalResults(
        suite="",
        title=set_record.title,
        data=eval_set.name,
        seed=seed,
        num_bootstrap=num_bootstrap,
        models=[record],
        sets=[set_record],
        results=result_rows(kept, num_bootstrap=num_bootstrap, seed=seed),
        seconds=seconds,
        own_wording={task.kind: task.wording},
    )
    return SetEvaluation(kept, results)


def _set_record(task: EvalTask[Any], eval_set: EvaluationSet, predictions: Predictions, title: str) -> SetRecord:
    """The set as results name it."""
    return SetRecord(
        name=eval_set.name,
        title=title,
        phrase=title,
        about="",
        kind=task.kind,
        variant=eval_set.name,
        n=predictions.num_samples,
        num_classes=len(eval_set.classnames or []) or None,
        largest_class_share=predictions.largest_class_share,
    )
