"""Evaluate models on the sets of a suite: predictions, intervals, paired differences, results.json and report.html."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

import evatool
from evatool.api import LoadedClip, load_clip
from evatool.data.eval_sets import EvalSet, open_eval_set
from evatool.errors import EvatoolError, RecipeError
from evatool.eval.gallery import Gallery, build_gallery, needed_pictures, write_gallery
from evatool.eval.measures import Answers, measures_of
from evatool.eval.report import text_table, write_eval_report
from evatool.eval.results import (
    DifferenceRow,
    EvalResults,
    Failure,
    ModelRecord,
    ResultRow,
    SetRecord,
    compared_pairs,
    file_name,
    main_metrics,
    read_results,
    write_predictions,
    write_results,
)
from evatool.eval.retrieval import (
    DIRECTIONS,
    PairFeatures,
    RetrievalResult,
    best_and_worst_retrievals,
    encode_pairs,
    retrieve,
)
from evatool.eval.suite import Suite, SuiteSet, find_sets, load_suite
from evatool.eval.zero_shot import ClassificationResult, Classifiers, classify
from evatool.progress import progress
from evatool.recipe.schema import EvalRecipe, EvalSection
from evatool.stages.run_dir import RunOptions, open_run_dir
from evatool.types import Result

log = logging.getLogger(__name__)

_PACKAGES = ("torch", "timm", "open_clip_torch", "clip-benchmark", "webdataset", "numpy", "pillow")


@dataclass
class Evaluation:
    """What is known so far: filled model by model and set by set."""

    section: EvalSection
    suite: Suite
    chosen: list[SuiteSet]
    folders: dict[str, Path]
    run_dir: Path
    results: EvalResults
    answers: dict[tuple[str, str], Answers] = field(default_factory=dict)  # by model and set
    gallery: Gallery | None = None  # of the last model that was evaluated on a retrieval set


def run(recipe: EvalRecipe, options: RunOptions) -> Result:
    """Evaluate every model on every set; what fails is named at the end and does not lose the others.

    Raises:
        RecipeError: no such suite or set, or two models share a file name.
        DataError: the folder of the sets is missing or holds none of them.
        EvatoolError: a set or model failed, after the results of the others were written.
    """
    section = recipe.eval
    suite = load_suite(section.suite)
    chosen = suite.chosen(section.sets)
    _check_names(section)
    folders = find_sets(section.data, suite, chosen)
    run_dir = open_run_dir(recipe, options)
    for stale in ("results.json", "gallery.json", "report.html"):  # of an earlier start that failed in part
        (run_dir.path / stale).unlink(missing_ok=True)
    started = time.perf_counter()
    results = EvalResults(
        suite=suite.name,
        title=suite.title,
        data=str(section.data),
        seed=section.seed,
        num_bootstrap=section.num_bootstrap,
        versions=_versions(),
        machine=_machine(),
    )
    evaluation = Evaluation(section, suite, chosen, folders, run_dir.path, results)
    with progress("evaluate", total=len(section.models) * len(chosen), unit="sets") as bar:
        for name, source in section.models.items():
            _evaluate_model(evaluation, name, source, on_set=lambda: bar.advance(1))
    _order_and_compare(evaluation)
    results.seconds = round(time.perf_counter() - started, 3)
    return _write(evaluation)


def _check_names(section: EvalSection) -> None:
    """Names become folders of kept predictions: two must not share one."""
    by_file: dict[str, list[str]] = {}
    for name in section.models:
        by_file.setdefault(file_name(name).lower(), []).append(name)
    problems = [
        f"eval.models: {' and '.join(map(repr, names))} share the folder name {shared!r}"
        for shared, names in by_file.items()
        if len(names) > 1
    ]
    if problems:
        raise RecipeError("models cannot be told apart", problems=problems, fix="give the models other names")


def _evaluate_model(evaluation: Evaluation, name: str, source: str, on_set: Callable[[], None]) -> None:
    """Load one model, evaluate it on every set, let it go."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(evaluation.section.seed)  # a preset's random weights are the same ones every time
            model = load_clip(source, device=device)
        record = ModelRecord(
            name=name,
            source=str(source),
            fingerprint=model.fingerprint,
            image_size=model.image_size,
            num_parameters=sum(p.numel() for p in model.model.parameters()),
            preset=model.config.name,
            weights=model.source,
        )
    except (EvatoolError, OSError, RuntimeError) as error:
        if len(evaluation.section.models) == 1:
            raise
        log.error("model %s cannot be loaded: %s", name, error)
        evaluation.results.failures.append(Failure(name, None, str(error)))
        return
    evaluation.results.models.append(record)
    classifiers: Classifiers = {}
    for entry in evaluation.chosen:
        try:
            _evaluate_set(evaluation, model, record, entry, device, classifiers)
        except Exception as error:  # whatever one set meets must not lose the others
            log.error("%s on %s failed: %s", name, entry.name, error)
            log.debug("trace of the failure", exc_info=True)
            kind = "" if isinstance(error, EvatoolError) else f"{type(error).__name__}: "
            evaluation.results.failures.append(Failure(name, entry.name, f"{kind}{error}"))
        on_set()


def _evaluate_set(
    evaluation: Evaluation,
    model: LoadedClip,
    record: ModelRecord,
    entry: SuiteSet,
    device: str,
    classifiers: Classifiers,
) -> None:
    """One model on one set: answers kept, metrics with intervals added to the results."""
    started = time.perf_counter()
    section, results = evaluation.section, evaluation.results
    eval_set = open_eval_set(
        evaluation.folders[entry.name], transform=model.preprocess, batch_size=section.batch_size, split=entry.split
    )
    if eval_set.kind != entry.kind:
        raise EvatoolError(
            f"evaluation set {entry.name} is a {eval_set.kind} set",
            where=str(evaluation.folders[entry.name] / "dataset_type.txt"),
            expected=entry.kind,
            fix=evaluation.suite.prepare,
        )
    answers: Answers
    with progress(f"{record.name}: {entry.title}", total=eval_set.num_samples, unit="pictures") as bar:
        if entry.kind == "classification":
            answers = classify(
                model, model.tokenizer, eval_set, device=device, classifiers=classifiers, on_batch=bar.advance
            )
            predictions = {"labels": answers.labels, "top": answers.top, "rank": answers.rank}
        else:
            features = encode_pairs(model, model.tokenizer, eval_set, device=device, on_batch=bar.advance)
            answers = retrieve(features)
            predictions = {direction: answers.rank(direction) for direction in DIRECTIONS}
            evaluation.gallery = _gallery(record.name, eval_set, features, answers)
    write_predictions(
        evaluation.run_dir / "predictions" / file_name(record.name) / f"{file_name(entry.name)}.npz", predictions
    )
    evaluation.answers[record.name, entry.name] = answers
    set_record = _set_record(evaluation.suite, entry, eval_set.num_samples, answers)
    if all(s.name != entry.name for s in results.sets):
        results.sets.append(set_record)
    seconds = round(time.perf_counter() - started, 3)
    results.results += _rows(record, set_record, answers, section, seconds)


def _set_record(suite: Suite, entry: SuiteSet, num_samples: int, answers: Answers) -> SetRecord:
    """The set as it was found; a part of the full set does not carry the full set's name alone."""
    num_classes = answers.num_classes if isinstance(answers, ClassificationResult) else None
    variant = f"{suite.name}/{entry.name}"
    expected = [
        f"{found} of {full} {what}"
        for what, found, full in (
            ("pictures", num_samples, entry.num_samples),
            ("classes", num_classes, entry.num_classes),
        )
        if full is not None and found != full
    ]
    return SetRecord(
        name=entry.name,
        title=entry.title,
        phrase=entry.phrase,
        about=entry.about,
        kind=entry.kind,
        variant=f"{variant} ({', '.join(expected)})" if expected else variant,
        n=num_samples,
        num_classes=num_classes,
        largest_class_share=answers.largest_class_share if isinstance(answers, ClassificationResult) else None,
        headline=entry.headline,
    )


def _rows(
    model: ModelRecord, record: SetRecord, answers: Answers, section: EvalSection, seconds: float
) -> list[ResultRow]:
    rows = []
    for measure in measures_of(answers):
        interval = measure.interval(num_resamples=section.num_bootstrap, seed=section.seed)
        rows.append(
            ResultRow(
                model=model.name,
                fingerprint=model.fingerprint,
                set=record.name,
                variant=record.variant,
                kind=record.kind,
                metric=measure.metric,
                value=interval.value,
                low=interval.low,
                high=interval.high,
                chance=measure.chance,
                n=len(measure.hits),
                num_classes=record.num_classes,
                seed=section.seed,
                seconds=seconds,
            )
        )
    return rows


def _gallery(model: str, eval_set: EvalSet, features: PairFeatures, answers: RetrievalResult) -> Gallery:
    """The clearest hits and misses in both directions, with their pictures."""
    chosen = [best_and_worst_retrievals(features, answers, direction=direction) for direction in DIRECTIONS]
    best = [example for some, _ in chosen for example in some]
    worst = [example for _, some in chosen for example in some]
    return build_gallery(
        model,
        eval_set.name,
        best,
        worst,
        pictures={i: eval_set.picture(i) for i in sorted(needed_pictures([*best, *worst]))},
        captions=features.captions,
        num_pictures=len(features.image),
    )


def _order_and_compare(evaluation: Evaluation) -> None:
    """Sets in the suite's order, and paired differences between the models that were measured on the same set."""
    results, section = evaluation.results, evaluation.section
    order = {entry.name: i for i, entry in enumerate(evaluation.chosen)}
    results.sets.sort(key=lambda s: order[s.name])
    for before, after in compared_pairs([m.name for m in results.models]):
        for record in results.sets:
            first, second = (evaluation.answers.get((m, record.name)) for m in (before, after))
            if first is None or second is None:
                continue
            for a, b in zip(measures_of(first), measures_of(second), strict=True):
                change = a.difference_to(b, num_resamples=section.num_bootstrap, seed=section.seed)
                results.differences.append(
                    DifferenceRow(
                        before, after, record.name, a.metric, change.value, change.low, change.high, len(a.hits)
                    )
                )


def _write(evaluation: Evaluation) -> Result:
    """Results, gallery and report; then the failures, if there were any."""
    results, folder = evaluation.results, evaluation.run_dir
    outputs = {"results": folder / "results.json", "report": folder / "report.html"}
    if results.results:
        write_results(outputs["results"], results)
        if evaluation.gallery:
            outputs["gallery"] = folder / "gallery.json"
            write_gallery(outputs["gallery"], evaluation.gallery)
        write_eval_report(outputs["report"], read_results(outputs["results"]), evaluation.gallery)
        outputs["predictions"] = folder / "predictions"
    if results.failures:
        _raise_failures(results, outputs)
    main = {(s.name, metric) for s in results.sets for metric in main_metrics(s.kind)}
    return Result(
        stage="eval",
        run_dir=folder,
        outputs=outputs,
        metrics={
            f"eval/{row.model}/{row.set}/{row.metric}": round(row.value, 6)
            for row in results.results
            if (row.set, row.metric) in main
        },
        table=text_table(results),
    )


def _raise_failures(results: EvalResults, outputs: dict[str, Path]) -> None:
    """Exit code 1 with every failed set named, and where the results of the others are."""
    lines = [f"{f.model}{f' on {f.set}' if f.set else ''}: " + f.message.replace("\n", "; ") for f in results.failures]
    names = list(dict.fromkeys(f.set or f"model {f.model}" for f in results.failures))
    raise EvatoolError(
        f"{len(results.failures)} evaluations failed ({', '.join(names)})\n" + "\n".join(f"  {line}" for line in lines),
        where=f"results of the others: {outputs['report']}" if results.results else None,
        fix="mend what is named above and run again with --resume; or leave sets out with eval.sets in a new --run-dir",
    )


def _versions() -> dict[str, str]:
    """Packages that the numbers depend on."""
    return {"evatool": evatool.__version__, "python": platform.python_version()} | {
        name: metadata.version(name) for name in _PACKAGES
    }


def _machine() -> str:
    """The machine in a line."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {platform.system()}"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{usable} CPU cores ({platform.machine()}), no GPU, {platform.system()}"
