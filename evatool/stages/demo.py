"""The whole chain on the bundled drawings: `make demo`. Finished stages are kept; an interrupted one goes on."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from evatool.core.atomic_io import write_bytes_atomically
from evatool.core.errors import EvatoolError
from evatool.eval.report.demo import ChainLosses, ChainStep, DemoReport, ShownSample, write_demo_report
from evatool.eval.report.gallery import read_gallery
from evatool.eval.results import EvalResults, read_results
from evatool.recipe.load import load_recipe
from evatool.runs.result import Result
from evatool.runs.run_dir import RunOptions
from evatool.stages import run_stage

log = logging.getLogger(__name__)

NUM_SAMPLE_PICTURES = 24
COST_NOTE = (
    "The models did not cost the same: the MIM-initialised one stands on the first CLIP and on masked image modelling, "
    "the student on all of them."
)


@dataclass(frozen=True)
class DemoOptions:
    """What `evatool demo` can be asked for."""

    out: Path = Path("runs/demo")
    seed: int = 0
    debug_size: bool = False
    """The same chain in seconds, on a few concepts; its model is good for nothing."""
    debug: bool = False


@dataclass(frozen=True)
class Step:
    """One stage of the chain: a shipped recipe, run in `<out>/<name>`."""

    name: str
    title: str
    text: str
    overrides: Callable[[Path, int], list[str]]
    model: str = ""
    """Name in the evaluation of the model that the stage makes."""


def _path(path: Path) -> str:
    return json.dumps(str(path))  # a JSON string is a TOML string


def _training(**sources: str) -> Callable[[Path, int], list[str]]:
    """Overrides of a training stage: its data, its seed, and the earlier stages it takes models from."""

    def overrides(out: Path, seed: int) -> list[str]:
        links = [f"{key}={_path(out / name)}" for key, name in sources.items()]
        return [f"data.train={_path(out / 'data-prepare' / 'train')}", f"train.seed={seed}", *links]

    return overrides


def _eval_overrides(out: Path, seed: int) -> list[str]:
    models = ", ".join(f"{json.dumps(step.model)} = {_path(out / step.name)}" for step in CHAIN if step.model)
    return [f"eval.data={_path(out / 'data-prepare' / 'eval')}", f"eval.models={{{models}}}", f"eval.seed={seed}"]


CHAIN = (
    Step(
        "data-prepare",
        "Prepare the data",
        "Drawings of six artists become training shards; a seventh artist, a new shading, black and white drawings "
        "and never-seen concepts are kept for evaluation.",
        lambda out, seed: [],
    ),
    Step(
        "train-clip",
        "Train a CLIP from scratch",
        "A small EVA-02-style CLIP learns to match pictures and captions from random weights. It is the teacher.",
        _training(),
        model="from scratch",
    ),
    Step(
        "pretrain-mim",
        "Masked image modelling",
        "A fresh image tower learns to predict the teacher's patch features where patches are hidden from it.",
        _training(**{"teacher.model": "train-clip"}),
    ),
    Step(
        "train-clip-mim",
        "Train CLIP again, from the MIM tower",
        "The same training as the first CLIP, except that the image tower starts from masked image modelling.",
        _training(**{"model.init.path": "pretrain-mim"}),
        model="MIM-initialised",
    ),
    Step(
        "distill",
        "Distil a smaller student",
        "A smaller CLIP learns from the captions and from the MIM-initialised model's features and similarities.",
        _training(**{"teacher.model": "train-clip-mim"}),
        model="distilled",
    ),
    Step(
        "export",
        "Export",
        "The student becomes a folder that stock open_clip opens, and is compared after reloading it there.",
        lambda out, seed: [f"export.checkpoint={_path(out / 'distill')}"],
    ),
    Step(
        "eval",
        "Evaluate",
        "All three models on every evaluation set, zero-shot, with 95 % intervals.",
        _eval_overrides,
    ),
)


def run(options: DemoOptions) -> Result:
    """Run what is not finished yet, then write `<out>/report.html`.

    Raises: whatever a stage raises; what is done stays done and is not repeated by the next call.
    """
    family = "debug" if options.debug_size else "demo"
    clock = Clock(options.out / "demo.json")
    results: dict[str, Result] = {}
    for number, step in enumerate(CHAIN, 1):
        log.info("step %d of %d: %s", number, len(CHAIN), step.title)
        with clock.measure(step.name):
            results[step.name] = _run_step(step, family, options)
    report = options.out / "report.html"
    evaluated = read_results(results["eval"].outputs["results"])
    write_demo_report(report, _report(options, results, clock, evaluated))
    return _result(options.out, report, results, clock)


def _run_step(step: Step, family: str, options: DemoOptions) -> Result:
    resolved = load_recipe(f"{family}/{step.name}", overrides=step.overrides(options.out, options.seed))
    run_options = RunOptions(
        name=resolved.name,
        run_dir=options.out / step.name,
        resume=(options.out / step.name).is_dir(),
        debug=options.debug,
        command=["evatool", "demo"],
    )
    try:
        return run_stage(resolved, run_options)
    except EvatoolError as error:
        # A stage tells how to go on with itself; here one command goes on with the whole chain.
        if error.fix and "--resume" in error.fix:
            error.fix = "run the same command again: finished work is not repeated"
        raise


class Clock:
    """Wall time of each step over all its starts, kept in a file so that a resumed demo still tells the truth."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds = _read_seconds(path)
        self._name, self._started = "", 0.0

    def measure(self, name: str) -> Clock:
        self._name, self._started = name, time.perf_counter()
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        spent = time.perf_counter() - self._started
        # A finished stage answers from its result file in an instant: that is not time spent on it.
        if spent > 0.5 or self._name not in self.seconds:
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + spent
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomically(self.path, json.dumps(self.seconds, indent=1).encode(), make_parents=True)


def _read_seconds(path: Path) -> dict[str, float]:
    """Wall times of earlier starts; none where there is no file of them, or a damaged one."""
    try:
        return {str(name): float(seconds) for name, seconds in json.loads(path.read_text(encoding="utf-8")).items()}
    except (FileNotFoundError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


# ------------------------------------------------------------------------------------------------------ the report


def _report(options: DemoOptions, results: dict[str, Result], clock: Clock, evaluated: EvalResults) -> DemoReport:
    prepared = results["data-prepare"].outputs
    gallery = results["eval"].outputs.get("gallery")
    size = " This is the debug size: its models are good for nothing." if options.debug_size else ""
    return DemoReport(
        title="From pictures to a distilled CLIP",
        lead="Every stage of the EVA pipeline ran on this machine, on real captioned drawings: masked image modelling "
        f"on a CLIP teacher, contrastive training from it, and distillation into a smaller student.{size}",
        results=evaluated,
        steps=[_chain_step(step, results[step.name], clock, options) for step in CHAIN],
        model_titles={"from scratch": "from scratch", "MIM-initialised": "MIM-initialised", "distilled": "distilled"},
        samples=_samples(prepared["train"]),
        contact_sheet=prepared["contact_sheet"],
        data_text="Pictures of the training set with their captions. Each concept was drawn by up to six artists.",
        losses=[curve for step in CHAIN if (curve := _loss_curve(step, results[step.name])) is not None],
        mim_images=[results["pretrain-mim"].outputs["mim_pictures"]],
        mim_text="From top to bottom: the picture, what the student saw of it, and how well its prediction at the "
        "hidden places agrees with the teacher's features.",
        gallery=read_gallery(gallery) if gallery else None,
        machine=evaluated.machine or f"{os.cpu_count()} x {platform.machine()}",
        versions=evaluated.versions,
        notes=[COST_NOTE, *_warnings(results)],
    )


# Figures of a stage that a reader of the report wants, with the words for them.
SHOWN = {
    "train_samples": "pictures to train on",
    "bad_samples": "bad samples",
    "steps": "steps",
    "samples_seen": "samples seen",
    "samples_per_sec": "samples/s",
    "train/loss": "last loss",
    "max_difference": "largest difference after reloading",
    "parameters": "parameters",
}


def _warnings(results: dict[str, Result]) -> list[str]:
    return [str(value) for result in results.values() for key, value in result.metrics.items() if key == "warning"]


def _chain_step(step: Step, result: Result, clock: Clock, options: DemoOptions) -> ChainStep:
    found = {words: result.metrics[key] for key, words in SHOWN.items() if key in result.metrics}
    shown = {words: f"{value:.4g}" if isinstance(value, float) else f"{value:,}" for words, value in found.items()}
    family = "debug" if options.debug_size else "demo"
    command = f"evatool {result.stage} {family}/{step.name}"
    return ChainStep(step.title, step.text, clock.seconds.get(step.name, 0.0), shown, command)


def _loss_curve(step: Step, result: Result) -> ChainLosses | None:
    path = result.outputs.get("metrics")
    if path is None:
        return None
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if row.get("train/loss") is not None]
    samples, losses = [float(row["samples_seen"]) for row in rows], [float(row["train/loss"]) for row in rows]
    if result.stage != "train-clip":
        return ChainLosses(step.title, samples, losses, model=step.model)
    batch = rows[0]["samples_seen"] / rows[0]["step"]
    return ChainLosses(step.title, samples, losses, math.log(batch), "ln(batch)", model=step.model)


def _samples(train: Path) -> list[ShownSample]:
    """Training pictures spread over the shards, as they are stored."""
    from evatool.data.tar.manifest import ShardIndex

    index = ShardIndex(train)
    stride = max(1, len(index) // NUM_SAMPLE_PICTURES)
    found = []
    for i in range(0, len(index), stride)[:NUM_SAMPLE_PICTURES]:
        members = index.read(i)
        image = next(data for name, data in members.items() if name in ("webp", "png", "jpg", "jpeg"))
        found.append(ShownSample(image, members["txt"].decode("utf-8")))
    return found


def _result(out: Path, report: Path, results: dict[str, Result], clock: Clock) -> Result:
    export = results["export"]
    return Result(
        stage="demo",
        run_dir=out,
        outputs={"report": report, "results": results["eval"].outputs["results"], "export": export.run_dir},
        metrics={"seconds": round(sum(clock.seconds.values()), 1), **results["eval"].metrics},
        next_command=f"evatool eval {export.run_dir} --suite drawings --data {out / 'data-prepare' / 'eval'}",
        table=results["eval"].table,
    )
