"""Opening the teachers that a recipe names."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from evatool.core.errors import RecipeError
from evatool.data.feature_store.spec import StoreSpec, Views
from evatool.inference.loaded_clip import DTYPES, LoadedClip, Precision, load_clip
from evatool.inference.tokenizers import tokenizer_facts
from evatool.recipe.schema.data import TrainDataSection
from evatool.recipe.schema.teacher import (
    TIMM_PREFIX,
    PatchTeacherSection,
    StoreSection,
    TeacherSection,
    store_path,
)
from evatool.stages.training.build import Job
from evatool.teachers.clip import LazyTeacher, TeacherFacts
from evatool.teachers.stored import open_teacher
from evatool.teachers.timm import TimmTeacher, load_timm_teacher

log = logging.getLogger(__name__)


def open_clip_teacher(job: Job, section: TeacherSection) -> LazyTeacher:
    """The CLIP that `section` names; every rank calls it. With a store it is read only to know who it is, and not even
    for that where the store was made with the same files.

    Raises: CheckpointError, UsageError as `load_clip`; RecipeError where the store has no folder.
    """

    def read(device: torch.device, precision: Precision) -> LoadedClip:
        teacher = load_clip(section.model, device=device, precision=precision)
        if tokenizer_facts(teacher.config):
            raise RecipeError(
                f"the teacher {teacher.config.name} has a tokenizer of its own, and a batch is tokenized once, for all",
                where="teacher.model",
                expected="a teacher with CLIP's byte pairs",
                fix="evatool store-features keeps what such a teacher says only for images: use pretrain-mim, or "
                "another teacher",
            )
        log.info("teacher: %s, %s, %s", teacher.config.name, precision, teacher.source)
        return teacher

    return _opened(job, section, read, _facts_of_clip, [section.model])


def open_patch_teacher(job: Job, section: PatchTeacherSection) -> LazyTeacher:
    """The CLIP or timm model whose patch features are learned; as `open_clip_teacher`."""

    def read(device: torch.device, precision: Precision) -> LoadedClip | TimmTeacher:
        size = section.image_size
        if not section.is_timm:
            clip = load_clip(section.model, device=device, precision=precision, image_size=size)
            if clip.config.open_clip is not None:
                raise RecipeError(
                    f"{clip.config.name} gives no patch features that evatool knows",
                    where="teacher.model",
                    expected="an EVA model, a ViT as OpenAI's and LAION's CLIP have it, or a timm model",
                    fix="name its image tower by its timm name: teacher.model = 'timm:NAME', teacher.weights = FILE",
                )
            log.info("teacher: %s, %s, %s", clip.config.name, precision, clip.source)
            return clip
        name = section.model.removeprefix(TIMM_PREFIX)
        teacher = load_timm_teacher(
            name,
            weights=section.weights,
            layer=section.layer,
            image_size=size,
            device=device,
            dtype=DTYPES[precision],
        )
        log.info("teacher: timm's %s, %s, %d x %d patches of %d", name, precision, *teacher.grid, teacher.embed_dim)
        return teacher

    sources = [section.model, str(section.image_size)]
    if section.is_timm:
        sources = [str(section.weights), section.model, str(section.layer), str(section.image_size)]
    return _opened(job, section, read, _facts_of_patches, sources)


def _facts_of_patches(teacher: LoadedClip | TimmTeacher, *, with_fingerprint: bool) -> TeacherFacts:
    if isinstance(teacher, LoadedClip):
        return _facts_of_clip(teacher, with_fingerprint=with_fingerprint)
    return TeacherFacts(
        name=f"{TIMM_PREFIX}{teacher.name}",
        fingerprint=teacher.fingerprint if with_fingerprint else "",
        image_size=teacher.image_size,
        grid=teacher.grid,
        width=teacher.embed_dim,
    )


def _facts_of_clip(teacher: LoadedClip, *, with_fingerprint: bool) -> TeacherFacts:
    config = teacher.config
    return TeacherFacts(
        name=config.name,
        fingerprint=teacher.fingerprint if with_fingerprint else "",
        image_size=config.image_size,
        grid=config.grid if config.open_clip is None else (0, 0),  # which only patch teachers have
        width=teacher.embed_dim,
        context_length=config.context_length,
        logit_scale=teacher.logit_scale,
        config=config.to_json(),
    )


def _opened(
    job: Job,
    section: TeacherSection,
    read: Callable[[torch.device, Precision], Any],
    facts_of: Callable[..., TeacherFacts],
    sources: list[str],
) -> LazyTeacher:
    device = job.world.device
    return open_teacher(
        read,
        facts_of,
        sources,
        device=device,
        precision=precision_of(section, device),
        compiles=section.compile,
        store=None if section.store is None else required_store_path(section.store, job.recipe.data),
        is_main=job.world.is_main,
    )


def precision_of(section: TeacherSection, device: torch.device) -> Precision:
    """The number format that the teacher computes in."""
    if section.precision != "auto":
        return section.precision
    return "bf16" if device.type == "cuda" else "fp32"


# ---------------------------------------------------------------------------------------------------------- stores


def required_store_path(store: StoreSection, data: TrainDataSection) -> Path:
    """Folder of the store. Raises: RecipeError where the recipe has to name it."""
    path = store_path(store, data)
    if path is None:
        raise RecipeError(
            "teacher features have no folder: the training shards are remote, or of several sources",
            where="teacher.store.path",
            fix="name a folder on this machine's disk",
        )
    return path


def views_of(store: StoreSection, specs: tuple[StoreSpec, ...]) -> Views:
    """The views of each sample that a run with this store draws."""
    return Views(store.views, store.seed, specs)
