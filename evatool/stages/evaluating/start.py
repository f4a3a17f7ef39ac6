"""The start of an evaluation: what is asked for is checked, the run folder opened, missing sets are fetched."""

from __future__ import annotations

import logging
import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

import evatool
from evatool.core.errors import DependencyError, RecipeError
from evatool.core.own_folder import OwnFolder, user_cache_folder
from evatool.distributed.collectives import gather_objects
from evatool.distributed.meeting import meet
from evatool.distributed.world import World
from evatool.eval.results import EvalResults, file_name
from evatool.eval.suite import Suite, SuiteSet, fetch_command, find_sets, load_suite
from evatool.recipe.schema import EvalRecipe, EvalSection
from evatool.runs.run_dir import RunOptions, open_run_dir
from evatool.stages.evaluating.suite_evaluation import SuiteEvaluation

log = logging.getLogger(__name__)

_PACKAGES = ("torch", "timm", "open_clip_torch", "clip-benchmark", "webdataset", "numpy", "pillow")
_WRITTEN_AGAIN = ("results.json", "results.csv", "results.md", "gallery.json", "report.html")


@dataclass(frozen=True)
class EvalRequest:
    """A suite, the sets of it that are asked for, and the folder where each is or will be."""

    suite: Suite
    chosen: list[SuiteSet]
    folders: dict[str, Path]


def check_request(section: EvalSection) -> EvalRequest:
    """The suite and its sets, before a run folder is made.

    Raises:
        RecipeError: no such suite or set, or two models share a file name.
        DataError: the folder of the sets is missing or holds none of them.
    """
    suite = load_suite(section.suite)
    chosen = suite.chosen(section.sets)
    _check_names(section)
    return EvalRequest(suite, chosen, find_sets(section.data, suite, chosen, may_be_empty=section.fetch))


def start_evaluation(recipe: EvalRecipe, options: RunOptions, request: EvalRequest, world: World) -> SuiteEvaluation:
    """An evaluation without results yet, on every rank; rank 0 opens the run folder and fetches missing sets."""
    section, suite, folders = recipe.eval, request.suite, request.folders
    if world.is_main:
        run_dir = open_run_dir(recipe, options)
        for stale in _WRITTEN_AGAIN:  # of an earlier start that failed in part
            (run_dir.path / stale).unlink(missing_ok=True)
        folders = fetch_sets(section, folders, suite.sets) if section.fetch else folders
    meet("to open the run folder and fetch what is missing")
    folders = gather_objects(folders)[0]  # rank 0 opens the run folder, the others follow
    if not world.is_main:
        run_dir = open_run_dir(recipe, options, world.rank)
    results = EvalResults(
        suite=suite.name,
        title=suite.title,
        data=str(section.data),
        seed=section.seed,
        num_bootstrap=section.num_bootstrap,
        versions=_versions(),
        machine=_machine(world.world_size),
    )
    cache = _cache_folder(section) if section.use_cache else None
    return SuiteEvaluation(
        section, suite, request.chosen, folders, run_dir.path, results, world, cache, run_dir.check_owner
    )


def _cache_folder(section: EvalSection) -> Path | None:
    """The folder of what is kept between evaluations, checked; None where nothing can be kept."""
    if section.cache_dir is None:
        return user_cache_folder()
    with OwnFolder(section.cache_dir, is_named=True, fix="set eval.cache_dir to a folder of your own").opened():
        return section.cache_dir


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


def fetch_sets(section: EvalSection, folders: dict[str, Path], sets: list[SuiteSet]) -> dict[str, Path]:
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
