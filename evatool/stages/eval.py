"""Evaluate models on the sets of a suite: answers, intervals, paired differences, results.json and report.html."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

import evatool
from evatool.core.errors import DependencyError, EvatoolError, RecipeError
from evatool.core.progress import progress
from evatool.distributed.collectives import gather_objects
from evatool.distributed.world import World, close_world, init_world
from evatool.eval.cache import default_folder
from evatool.eval.lockstep import fail_on_all_ranks
from evatool.eval.results import EvalResults, Failure, file_name
from evatool.eval.suite import Suite, SuiteSet, fetch_command, find_sets, load_suite
from evatool.recipe.schema import EvalRecipe, EvalSection
from evatool.runs.result import Result
from evatool.runs.run_dir import RunOptions, open_run_dir
from evatool.stages.evaluating.measure import measure_set
from evatool.stages.evaluating.models import load_model
from evatool.stages.evaluating.output import write_outputs
from evatool.stages.evaluating.suite_evaluation import SuiteEvaluation

log = logging.getLogger(__name__)

_PACKAGES = ("torch", "timm", "open_clip_torch", "clip-benchmark", "webdataset", "numpy", "pillow")


def run(recipe: EvalRecipe, options: RunOptions) -> Result:
    """Evaluate every model on every set; what fails is named at the end and does not lose the others.

    Every rank of a job calls it: pictures, prompts and similarities are divided over the ranks, rank 0 writes. Under
    `--resume` a set whose answers are kept is not evaluated again.

    Raises:
        RecipeError: no such suite or set, or two models share a file name.
        DataError: the folder of the sets is missing or holds none of them.
        EvatoolError: a set or model failed, after the results of the others were written.
    """
    section = recipe.eval
    suite = load_suite(section.suite)
    chosen = suite.chosen(section.sets)
    _check_names(section)
    folders = find_sets(section.data, suite, chosen, may_be_empty=section.fetch)
    world = init_world()
    try:
        return write_outputs(_evaluate(recipe, options, world, suite, folders))
    finally:
        close_world()


def _evaluate(
    recipe: EvalRecipe, options: RunOptions, world: World, suite: Suite, folders: dict[str, Path]
) -> SuiteEvaluation:
    """All answers, on every rank."""
    section = recipe.eval
    if world.is_main:
        run_dir = open_run_dir(recipe, options)
        # of an earlier start that failed in part
        for stale in ("results.json", "results.csv", "results.md", "gallery.json", "report.html"):
            (run_dir.path / stale).unlink(missing_ok=True)
        folders = _fetch(section, folders, suite.sets) if section.fetch else folders
    folders = gather_objects(folders)[0]  # rank 0 opens the run folder, the others follow
    if not world.is_main:
        run_dir = open_run_dir(recipe, options, world.rank)
    started = time.perf_counter()
    results = EvalResults(
        suite=suite.name,
        title=suite.title,
        data=str(section.data),
        seed=section.seed,
        num_bootstrap=section.num_bootstrap,
        versions=_versions(),
        machine=_machine(world.world_size),
    )
    cache = (section.cache_dir or default_folder()) if section.use_cache else None
    chosen = suite.chosen(section.sets)
    evaluation = SuiteEvaluation(section, suite, chosen, folders, run_dir.path, results, world, cache)
    with progress("evaluate", total=len(section.models) * len(chosen), unit="sets") as bar:
        for name, source in section.models.items():
            _evaluate_model(evaluation, name, source, on_set=lambda: bar.advance(1))
    results.seconds = round(time.perf_counter() - started, 3)
    return evaluation


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


def _evaluate_model(evaluation: SuiteEvaluation, name: str, source: str, on_set: Callable[[], None]) -> None:
    """Load one model, evaluate it on every set, let it go."""
    results = evaluation.results
    try:
        with fail_on_all_ranks():
            model = load_model(name, source, evaluation.section, evaluation.world, evaluation.cache)
    except (EvatoolError, OSError, RuntimeError) as error:
        if len(evaluation.section.models) == 1:
            raise
        log.error("model %s cannot be loaded: %s", name, error)
        results.failures.append(Failure(name, None, str(error)))
        return
    results.models.append(model.record)
    for entry in evaluation.chosen:
        try:
            measure_set(evaluation, model, entry)
        except Exception as error:  # whatever one set meets must not lose the others
            log.error("%s on %s failed: %s", name, entry.name, error)
            log.debug("trace of the failure", exc_info=True)
            kind = "" if isinstance(error, EvatoolError) else f"{type(error).__name__}: "
            results.failures.append(Failure(name, entry.name, f"{kind}{error}"))
        on_set()
    evaluation.images.pop(name, None)


def _fetch(section: EvalSection, folders: dict[str, Path], sets: list[SuiteSet]) -> dict[str, Path]:
    """Download the sets that are missing and have a copy on the hub; a download that fails fails its set later."""
    from huggingface_hub import snapshot_download

    for entry in sets:
        folder = folders.get(entry.name)
        if folder is None or folder.is_dir() or not entry.hub_repo:
            continue
        log.info("fetching %s from %s", entry.title, entry.hub_repo)
        partial = folder.with_name(f".{folder.name}.partial")  # files that are complete are not fetched again
        patterns = ["*.txt", f"{entry.split}/*", *([f"{entry.train_split}/*"] if entry.train_split else [])]
        try:
            snapshot_download(entry.hub_repo, repo_type="dataset", local_dir=partial, allow_patterns=patterns)
        except Exception as error:  # the hub's client raises what its transport raises
            raise DependencyError(
                f"{entry.title} cannot be fetched: {error}",
                where=entry.hub_repo,
                fix=f"try again, or by hand: {fetch_command(entry, folder)}",
            ) from error
        partial.rename(folder)
    return folders


def _versions() -> dict[str, str]:
    """Packages that the numbers depend on."""
    return {"evatool": evatool.__version__, "python": platform.python_version()} | {
        name: metadata.version(name) for name in _PACKAGES
    }


def _machine(world_size: int) -> str:
    """The machine in a line."""
    ranks = f", {world_size} ranks" if world_size > 1 else ""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {platform.system()}{ranks}"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{usable} CPU cores ({platform.machine()}), no GPU, {platform.system()}{ranks}"
