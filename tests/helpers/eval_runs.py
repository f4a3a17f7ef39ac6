"""Folders of kept predictions whose models are right by a share that the test chooses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from evatool.eval.prediction_store import KeptPredictions, prediction_path, write_predictions
from evatool.eval.predictions import ClassificationResult
from evatool.eval.results import EvalResults, ModelRecord, ResultRow, SetRecord, write_results

N = 2000
SUITE = "imagenet-robustness"
SETS = ["imagenet1k", "imagenetv2", "imagenet-a", "imagenet-r", "imagenet_sketch", "objectnet"]


def a_run(
    folder: Path, accuracy: float, *, models: int = 1, seed: int | None = None, samples: str = "same", partial: str = ""
) -> Path:
    """A run folder of `models` models whose hits nest: a better one is right wherever a worse one is."""
    results = EvalResults(SUITE, "ImageNet and its variants", "data", seed=0, num_bootstrap=300)
    difficulty = np.random.default_rng(0).random(N)
    labels = np.arange(N, dtype=np.int32) % 10
    for m in range(models):
        model = ModelRecord(f"model {m}", "source", f"print {folder.name} {m}", 224, 10, "EVA02-CLIP-L-14")
        if seed is not None:
            model = replace(model, recipe="one recipe", train_seed=seed)
        results.models.append(model)
        for name in SETS:
            record = SetRecord(name, name, name, "", "classification", name, N, 10, samples=samples, partial=partial)
            right = difficulty < accuracy + 0.1 * m
            predictions = ClassificationResult(
                labels,
                np.where(right, labels, (labels + 1) % 10)[:, None].repeat(5, 1).astype(np.int32),
                np.where(right, 0, 1).astype(np.int32),
                10,
                np.ones(N, np.float32),
            )
            if record not in results.sets:
                results.sets.append(record)
            value = float(right.mean())
            about = (model.name, model.fingerprint, name, name, "classification", "top1")
            row = ResultRow(*about, value, 0, 1, 0.1, N, 10, 0, 1.0)
            results.results.append(row)
            settings = {"precision": "fp32", "resize": "shortest", "decode": "exact", "prompts": ""}
            write_predictions(
                prediction_path(folder, model.name, name),
                KeptPredictions("k", model, record, settings, 1.0, predictions),
            )
    write_results(folder / "results.json", results)
    return folder
