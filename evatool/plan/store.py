"""How many bytes a recipe's stored teacher features will take, beside those of its training shards. No torch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from evatool.core.bounded_json import read_json
from evatool.model.presets import resolve_preset
from evatool.plan.job import teacher_config
from evatool.recipe.schema import (
    DistillRecipe,
    PretrainMimRecipe,
    Recipe,
    StoreSection,
    TeacherSection,
    TrainClipRecipe,
)
from evatool.recipe.schema.teacher import store_path

log = logging.getLogger(__name__)

_Taught = PretrainMimRecipe | TrainClipRecipe | DistillRecipe

WARNED_MULTIPLE = 10.0
"""Times the bytes of the shards, above which a dry run warns."""

_CHECK_BYTES = 8  # mark and checksum of a row (data/feature_store/spec.py)


def store_sizes(recipe: Recipe) -> dict[str, Any]:
    """Sizes of the stores of a recipe, by name; empty where it has none.

    Warns where they are many times the shards' own bytes.
    """
    if not isinstance(recipe, _Taught):
        return {}
    sections: dict[str, TeacherSection] = {}
    if isinstance(recipe, DistillRecipe):
        sections = dict(recipe.all_teachers)
    elif recipe.teacher is not None:
        sections = {"": recipe.teacher}
    sizes: dict[str, Any] = {}
    for name, section in sections.items():
        if section.store is not None:
            found = _sizes_of(recipe, section, section.store)
            sizes |= {f"store.{name}.{key}" if name else f"store.{key}": value for key, value in found.items()}
    return sizes


def _sizes_of(recipe: _Taught, section: TeacherSection, store: StoreSection) -> dict[str, Any]:
    path = store_path(store, recipe.data)
    sizes: dict[str, Any] = {} if path is None else {"path": str(path)}
    numbers = _numbers(recipe, section, store)
    if numbers is None:
        log.warning("the width of %s is not known before it is loaded, and so not the size of its store", section.model)
        return sizes
    row_bytes = 2 * numbers + _CHECK_BYTES
    sizes["bytes_per_sample"] = store.views * row_bytes
    known = _shards(recipe)
    if known is None:
        return sizes
    samples, shard_bytes = known
    total = samples * store.views * row_bytes
    times = total / shard_bytes
    sizes |= {"bytes": total, "shard_bytes": shard_bytes, "times_the_shards": round(times, 2)}
    if times > WARNED_MULTIPLE:
        fewer = "" if getattr(store, "masked_only", True) else "teacher.store.masked_only = true, "
        log.warning(
            "the stored features take %.3g GB, %.3g times the %.3g GB of the shards: %sfewer views, or no "
            "[teacher.store] where the teacher is cheap",
            total / 1e9,
            times,
            shard_bytes / 1e9,
            fewer,
        )
    return sizes


def _numbers(recipe: _Taught, section: TeacherSection, store: StoreSection) -> int | None:
    """Numbers in one row of the store; None where the teacher's width is not known."""
    config, _ = teacher_config(section.model)
    width = None if config is None else config.embed_dim
    if isinstance(recipe, DistillRecipe):
        return None if width is None else 2 * width
    student = resolve_preset(recipe.model.preset).with_image_size(recipe.model.image_size)
    width = width or student.predict_dim
    patches = student.grid[0] * student.grid[1]
    masks = recipe.objective if isinstance(recipe, PretrainMimRecipe) else recipe.objective.mim
    if getattr(store, "masked_only", False) and masks is not None:
        patches = max(1, round(masks.mask_ratio * patches))
    return None if width is None else patches * width


def _shards(recipe: _Taught) -> tuple[int, int] | None:
    """Samples and bytes of the training shards, where a manifest on this machine says it."""
    train = recipe.data.train
    if train is None:
        return None
    manifest = Path(train) if Path(train).suffix == ".json" else Path(train) / "manifest.json"
    try:
        shards = read_json(manifest, 2**30, memory_per_byte=20)["shards"]
        return sum(s["num_samples"] for s in shards), max(1, sum(s["bytes"] for s in shards))
    except (OSError, ValueError, KeyError, TypeError):
        return None
