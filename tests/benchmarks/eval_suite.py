"""The six bundled classification sets: `evatool eval` against clip-benchmark's own evaluation, wall clock.

    python tests/benchmarks/eval_suite.py MODEL DATA [--sets new-artist ...] [--bf16]

MODEL is what `load_clip` reads, DATA a run folder of data-prepare. Both sides run in this process, one after the other,
with the same threads, batch size, float32 and exact decoding. Counted of evatool: everything from the recipe to the
report on disk, with empty caches; of clip-benchmark: model, classifier and logits of every set, without its metrics
and output. clip-benchmark creates its model for every set, as its command does; evatool loads it once, and encodes a
picture or prompt that several sets have once. The times without loading stand beside those with it, and the processor's
seconds (all threads) beside the clock's. Imports are in neither.
Gate: the same answer for every sample, except where the two best logits differ by less than 1e-4. With `--bf16` also
the difference in top-1 of bf16 weights: at most 0.05 points.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics.zeroshot_classification import run_classification, zero_shot_classifier
from torch.utils.data import DataLoader

from evatool.api import load_clip
from evatool.data.eval_pictures import EvalTransform
from evatool.data.eval_sets import open_eval_set
from evatool.eval.answers import ClassificationResult
from evatool.eval.predictions import prediction_path, read_predictions
from evatool.eval.results import read_results
from evatool.recipe.schema import EvalRecipe, EvalSection
from evatool.stages import eval as stage
from evatool.stages.run_dir import RunOptions

SETS = ["new-artist", "new-shading", "black-and-white", "never-seen", "coarse-group", "coarse-subgroup"]
BATCH = 64  # clip-benchmark's own default


class Times(NamedTuple):
    """Seconds by the clock, and of the processor over all threads."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Times:
        return cls(time.perf_counter(), time.process_time())

    def __sub__(self, earlier: Times) -> Times:
        return Times(self.wall - earlier.wall, self.cpu - earlier.cpu)

    def __str__(self) -> str:
        return f"{self.wall:7.2f} s ({self.cpu:.2f} s of the processor)"


def clip_benchmark(model: str, data: Path, sets: list[str], device: str) -> tuple[dict[str, np.ndarray], Times, float]:
    """Answers by set, times in all, seconds of loading models."""
    answers, loading = {}, 0.0
    started = Times.now()
    for name in sets:
        before = time.perf_counter()
        clip = load_clip(model, device=device)
        loading += time.perf_counter() - before
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = build_dataset(
                f"wds/{name}", root=str(data / name), transform=clip.preprocess, split="test", download=False
            )
            loader = DataLoader(dataset, batch_size=BATCH, num_workers=0)
            weights = zero_shot_classifier(clip, clip.tokenizer, dataset.classes, dataset.templates, device, amp=False)
            logits, _ = run_classification(clip, weights, loader, device, amp=False)
        answers[name] = logits.argmax(dim=1).numpy()
    return answers, Times.now() - started, loading


def evatool(
    model: str, data: Path, sets: list[str], folder: Path, precision: str
) -> tuple[dict[str, ClassificationResult], Times]:
    """Answers by set, and times, report included."""
    section = EvalSection(
        models={"m": model},
        data=data,
        sets=sets,
        batch_size=BATCH,
        cache_dir=folder / "cache",
        precision=precision,  # type: ignore[arg-type]
    )
    started = Times.now()
    stage.run(EvalRecipe(eval=section), RunOptions(name="benchmark", run_dir=folder / precision))
    taken = Times.now() - started
    read_results(folder / precision / "results.json")
    return {name: read_predictions(prediction_path(folder / precision, "m", name)).answers for name in sets}, taken  # type: ignore[return-value]


def distinct(data: Path, sets: list[str]) -> int:
    """Pictures with different bytes over all sets."""
    opened = [open_eval_set(data / name, transform=EvalTransform(8), batch_size=BATCH).samples for name in sets]
    return len({samples.picture(i) for samples in opened for i in range(len(samples))})


def main() -> None:
    """Print both times, the share of loading, and the ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--bf16", action="store_true")
    asked = parser.parse_args()
    data = asked.data / "eval" if (asked.data / "eval").is_dir() else asked.data
    device = "cuda" if torch.cuda.is_available() else "cpu"
    load_clip(asked.model)  # imports and the disk's cache are the same for both
    with tempfile.TemporaryDirectory() as folder:
        ours, taken = evatool(asked.model, data, asked.sets, Path(folder), "fp32")
        before = time.perf_counter()
        load_clip(asked.model, device=device)
        loading = time.perf_counter() - before
        theirs, reference, their_loading = clip_benchmark(asked.model, data, asked.sets, device)
        flips = 0
        for name in asked.sets:
            differ = np.flatnonzero(ours[name].top[:, 0] != theirs[name])
            assert set(differ) <= set(ours[name].near_ties), f"{name}: answers differ beyond near ties"
            flips += len(differ)
        samples = sum(len(answers.labels) for answers in ours.values())
        print(
            f"{asked.model} on {device}: {len(asked.sets)} sets, {samples:,} pictures ({distinct(data, asked.sets):,} "
            f"distinct), batches of {BATCH}, {torch.get_num_threads()} threads"
        )
        print(f"clip-benchmark {reference}, of that {their_loading:.2f} s loading the model {len(asked.sets)} times")
        print(f"evatool        {taken}, of that {loading:.2f} s loading it once")
        without = (reference.wall - their_loading) / (taken.wall - loading)
        print(f"{reference.wall / taken.wall:.2f} x by the clock, {without:.2f} x without loading", end="; ")
        print(f"{reference.cpu / taken.cpu:.2f} x of the processor")
        print(f"answers that differ: {flips} of {samples:,}, all near ties")
        if asked.bf16:
            half, _ = evatool(asked.model, data, asked.sets, Path(folder), "bf16")
            change = sum(int(half[n].correct(1).sum()) - int(ours[n].correct(1).sum()) for n in asked.sets) / samples
            flipped = sum(int((half[n].top[:, 0] != ours[n].top[:, 0]).sum()) for n in asked.sets)
            assert abs(change) <= 0.0005, f"bf16 changes top-1 by {100 * change:+.3f} points"
            print(f"bf16: top-1 {100 * change:+.3f} points over all pictures, {flipped} answers differ")


if __name__ == "__main__":
    main()
