"""The six bundled classification sets: `evatool eval` against clip-benchmark's own evaluation, wall clock.

    python tests/benchmarks/eval_suite.py MODEL DATA [--sets new-artist ...] [--threads 1 2] [--rounds 5] [--bf16]

MODEL is what `load_clip` reads, DATA a run folder of data-prepare. Both sides run in this process by turns, one round
after the other with each number of compute threads, with the same batch size, float32 and exact decoding; the median
round counts. Counted of evatool: everything from the recipe to the report on disk, with empty caches; of
clip-benchmark: model, classifier and logits of every set, without its metrics and output. clip-benchmark creates its
model for every set, as its command does; evatool loads it once, and encodes a picture or prompt that several sets have
once. Seconds of loading models and of the processor (all threads) stand beside those of the clock. Imports are in
neither.

Gates: the same answer for every sample, except where the two best logits differ by less than 1e-4; with `--at-least 2`
the ratio of the medians; with `--bf16` top-1 of bf16 weights: within 0.05 points of clip-benchmark's with the same
weights, and of float32's within 0.05 points or what chance gives.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics.zeroshot_classification import run_classification, zero_shot_classifier
from scipy.stats import binomtest
from side_by_side import machine
from torch.utils.data import DataLoader

from evatool.data.eval.eval_set import open_eval_set
from evatool.data.image.eval_transforms import EvalTransform
from evatool.eval.prediction_store import prediction_path, read_predictions
from evatool.eval.predictions import ClassificationResult
from evatool.inference.loaded_clip import load_clip
from evatool.recipe.schema import EvalRecipe, EvalSection
from evatool.runs.run_dir import RunOptions
from evatool.stages import eval as stage
from evatool.stages.evaluating import models as eval_models

SETS = ["new-artist", "new-shading", "black-and-white", "never-seen", "coarse-group", "coarse-subgroup"]
BATCH = 64  # clip-benchmark's own default

Predictions = TypeVar("Answers")


class Times(NamedTuple):
    """Seconds by the clock, of the processor over all threads, and by the clock in `load_clip`."""

    wall: float
    cpu: float
    loading: float


class Loads:
    """Seconds spent in `load_clip`, which both sides call by this object."""

    def __init__(self) -> None:
        self.seconds, self._load = 0.0, load_clip

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = time.perf_counter()
        clip = self._load(*args, **kwargs)
        self.seconds += time.perf_counter() - before
        return clip


def timed(work: Callable[[Loads], Predictions]) -> tuple[Predictions, Times]:
    """What `work` gives, and its times."""
    loads = eval_models.load_clip = Loads()  # type: ignore[assignment]
    wall, cpu = time.perf_counter(), time.process_time()
    answers = work(loads)
    return answers, Times(time.perf_counter() - wall, time.process_time() - cpu, loads.seconds)


def clip_benchmark(
    model: str, data: Path, sets: list[str], device: str, load: Callable[..., Any]
) -> dict[str, np.ndarray]:
    """Answers by set."""
    answers = {}
    for name in sets:
        clip = load(model, device=device)
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # its bars
            warnings.simplefilter("ignore")
            dataset = build_dataset(
                f"wds/{name}", root=str(data / name), transform=clip.preprocess, split="test", download=False
            )
            loader = DataLoader(dataset, batch_size=BATCH, num_workers=0)
            weights = zero_shot_classifier(clip, clip.tokenizer, dataset.classes, dataset.templates, device, amp=False)
            logits, _ = run_classification(clip, weights, loader, device, amp=False)
        answers[name] = logits.argmax(dim=1).numpy()
    return answers


def evatool(
    model: str, data: Path, sets: list[str], folder: Path, precision: str = "fp32"
) -> dict[str, ClassificationResult]:
    """Answers by set; the report is written."""
    section = EvalSection(
        models={"m": model},
        data=data,
        sets=sets,
        batch_size=BATCH,
        cache_dir=folder / "cache",
        precision=precision,  # type: ignore[arg-type]
    )
    stage.run(EvalRecipe(eval=section), RunOptions(name="benchmark", run_dir=folder / "run"))
    return {name: read_predictions(prediction_path(folder / "run", "m", name)).predictions for name in sets}  # type: ignore[misc]


def count_flips(ours: dict[str, ClassificationResult], theirs: dict[str, np.ndarray]) -> int:
    """Answers that differ, all of them near ties."""
    flips = 0
    for name, answers in ours.items():
        differ = np.flatnonzero(answers.top[:, 0] != theirs[name])
        assert set(differ) <= set(answers.near_ties), f"{name}: answers differ beyond near ties"
        flips += len(differ)
    return flips


def distinct(data: Path, sets: list[str]) -> int:
    """Pictures with different bytes over all sets."""
    opened = [open_eval_set(data / name, transform=EvalTransform(8), batch_size=BATCH).samples for name in sets]
    return len({samples.image(i) for samples in opened for i in range(len(samples))})


def compare(asked: argparse.Namespace, data: Path, device: str, threads: int) -> dict[str, ClassificationResult]:
    """Rounds by turns with one number of threads; prints the medians and returns evatool's answers."""
    torch.set_num_threads(threads)
    times: dict[str, list[Times]] = {"clip-benchmark": [], "evatool": []}
    flips = 0
    for _ in range(asked.rounds):
        with tempfile.TemporaryDirectory() as folder:
            theirs, taken = timed(functools.partial(clip_benchmark, asked.model, data, asked.sets, device))
            times["clip-benchmark"].append(taken)
            ours, taken = timed(lambda _, at=folder: evatool(asked.model, data, asked.sets, Path(at)))
            times["evatool"].append(taken)
            flips += count_flips(ours, theirs)
    print(f"\n| {threads} compute threads, median of {asked.rounds} | seconds | of the processor | loading the model |")
    print("|---|---|---|---|")
    middle = {
        name: Times(*(statistics.median(column) for column in zip(*rows, strict=True))) for name, rows in times.items()
    }
    for name, m in middle.items():
        spread = f"{min(t.wall for t in times[name]):.2f} to {max(t.wall for t in times[name]):.2f}"
        print(f"| {name} | {m.wall:.2f} ({spread}) | {m.cpu:.2f} | {m.loading:.2f} |")
    theirs_, ours_ = middle["clip-benchmark"], middle["evatool"]
    without = (theirs_.wall - theirs_.loading) / (ours_.wall - ours_.loading)
    ratio = theirs_.wall / ours_.wall
    print(
        f"{ratio:.2f} x by the clock, {without:.2f} x without loading, {theirs_.cpu / ours_.cpu:.2f} x of the processor"
    )
    print(
        f"answers that differ: {flips} of {asked.rounds * sum(len(a.labels) for a in ours.values()):,}, all near ties"
    )
    assert ratio >= asked.at_least, f"{ratio:.2f} x is less than {asked.at_least} x"
    return ours


def half_precision(asked: argparse.Namespace, data: Path, device: str, whole: dict[str, ClassificationResult]) -> None:
    """What bf16 weights change, all pictures counting the same: against clip-benchmark with the same weights, and
    against float32, where answers that flip between right and wrong come out even but for chance."""
    samples = sum(len(answers.labels) for answers in whole.values())
    theirs = clip_benchmark(asked.model, data, asked.sets, device, functools.partial(load_clip, precision="bf16"))
    with tempfile.TemporaryDirectory() as folder:
        half = evatool(asked.model, data, asked.sets, Path(folder), "bf16")
    right = {name: answers.correct(1) for name, answers in half.items()}
    apart = sum(int(right[n].sum()) - int((theirs[n] == half[n].labels).sum()) for n in asked.sets) / samples
    won = sum(int((right[n] & ~whole[n].correct(1)).sum()) for n in asked.sets)
    lost = sum(int((~right[n] & whole[n].correct(1)).sum()) for n in asked.sets)
    flipped = sum(int((half[n].top[:, 0] != whole[n].top[:, 0]).sum()) for n in asked.sets)
    print(f"\nbf16: top-1 {100 * apart:+.3f} points from clip-benchmark's with the same weights")
    print(
        f"  from float32 {100 * (won - lost) / samples:+.3f} points: {flipped} of {samples:,} answers differ, "
        f"{won} now right, {lost} now wrong"
    )
    assert abs(apart) <= 0.0005, "bf16 differs from clip-benchmark's"
    chance = 1.0 if won == lost else binomtest(won, won + lost).pvalue
    assert abs(won - lost) <= 0.0005 * samples or chance > 0.05, "bf16 changes top-1 by more than chance"


def main() -> None:
    """Print times, the share of loading, and the ratio, for each number of threads."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="compute threads; each in turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--at-least", type=float, default=0.0, help="gate on the ratio of the medians")
    parser.add_argument("--bf16", action="store_true")
    asked = parser.parse_args()
    data = asked.data / "eval" if (asked.data / "eval").is_dir() else asked.data
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:  # what is imported or read for the first time counts for neither
        evatool(asked.model, data, asked.sets[:1], Path(folder))
        clip_benchmark(asked.model, data, asked.sets[:1], device, load_clip)
    opened = [open_eval_set(data / name, transform=EvalTransform(8), batch_size=BATCH).samples for name in asked.sets]
    print(
        f"{asked.model} on {device}: {len(asked.sets)} sets, {sum(map(len, opened)):,} pictures "
        f"({distinct(data, asked.sets):,} distinct), batches of {BATCH}; {machine()}"
    )
    for threads in asked.threads:
        ours = compare(asked, data, device, threads)
    if asked.bf16:
        half_precision(asked, data, device, ours)


if __name__ == "__main__":
    main()
