"""Frozen teachers: what is known of one without its weights, and the weights only when a picture has no features yet."""

# B batch, S input side in pixels, N patches, T width of the features

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evatool.api import LoadedClip, load_clip
from evatool.data.feature_store import StoreSpec, Views
from evatool.distributed.collectives import gather_objects
from evatool.errors import RecipeError
from evatool.model.config import ModelConfig
from evatool.model.patch_teacher import TimmTeacher, load_timm_teacher, resize_grid
from evatool.recipe.data_sections import TrainDataSection
from evatool.recipe.teacher_sections import (
    TIMM_PREFIX,
    PatchTeacherSection,
    StoreSection,
    TeacherSection,
    store_path,
)
from evatool.stages.run_dir import write_json
from evatool.stages.wiring import Job

log = logging.getLogger(__name__)

_SEEN = "teacher_seen.json"
_RANDOM_SEED = 8_191
"""Of a teacher with random weights: not the student's, and the same however late it is loaded."""


@dataclass(frozen=True)
class TeacherFacts:
    """What a run needs to know of a teacher before it runs, if it runs at all."""

    name: str
    fingerprint: str
    """Equal if and only if two teachers say the same; "" where no store asks for it."""
    image_size: int
    grid: tuple[int, int]
    width: int
    context_length: int = 0
    logit_scale: float = 1.0
    config: dict[str, Any] | None = None
    """A CLIP's configuration."""


class LazyTeacher:
    """A frozen model that is loaded when it is first asked for features.

    Args:
        facts: what it would say of itself.
        load: reads its weights, onto this rank's device.
    """

    def __init__(self, facts: TeacherFacts, load: Callable[[], Any]) -> None:
        self.facts, self._load = facts, load

    @cached_property
    def loaded(self) -> Any:
        """The teacher itself."""
        return self._load()

    @property
    def is_loaded(self) -> bool:
        """True once its weights were read."""
        return "loaded" in self.__dict__

    @property
    def config(self) -> ModelConfig:
        """A CLIP's configuration."""
        assert self.facts.config is not None
        return ModelConfig.from_json(self.facts.config)

    @property
    def image_size(self) -> int:
        """Input side in pixels."""
        return self.facts.image_size

    @property
    def embed_dim(self) -> int:
        """Width of the features."""
        return self.facts.width

    @property
    def context_length(self) -> int:
        """Text tokens of a caption."""
        return self.facts.context_length

    @property
    def logit_scale(self) -> float:
        """The temperature's inverse, exponentiated."""
        return self.facts.logit_scale

    @property
    def model(self) -> nn.Module:
        """The towers."""
        return self.loaded.model

    def encode_image(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, T)."""
        return self.loaded.encode_image(image)


class PatchTeacher:
    """Patch features of a teacher on the student's grid."""

    def __init__(self, teacher: LazyTeacher, grid: tuple[int, int]) -> None:
        self.teacher, self.grid = teacher, grid

    def visual_tokens(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, N, T)."""
        return resize_grid(self.teacher.loaded.visual_tokens(image), self.teacher.facts.grid, self.grid)


def open_clip_teacher(job: Job, section: TeacherSection) -> LazyTeacher:
    """The CLIP that `section` names; every rank calls it. With a store it is read only to know who it is, and not even
    for that where the store was made with the same files.

    Raises: CheckpointError, UsageError as `load_clip`; RecipeError where the store has no folder.
    """

    def load() -> LoadedClip:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_RANDOM_SEED)
            teacher = load_clip(section.model, device=job.world.device)
        log.info("teacher: %s, %s", teacher.config.name, teacher.source)
        return teacher

    return _opened(job, section, load, _facts_of_clip, [section.model])


def open_patch_teacher(job: Job, section: PatchTeacherSection) -> LazyTeacher:
    """The CLIP or timm model whose patch features are learned; as `open_clip_teacher`."""

    def load() -> LoadedClip | TimmTeacher:
        device = job.world.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_RANDOM_SEED)
            if not section.is_timm:
                clip = load_clip(section.model, device=device, image_size=section.image_size)
                log.info("teacher: %s, %s", clip.config.name, clip.source)
                return clip
            name = section.model.removeprefix(TIMM_PREFIX)
            size, layer = section.image_size, section.layer
            teacher = load_timm_teacher(name, weights=section.weights, layer=layer, image_size=size, device=device)
        log.info("teacher: timm's %s, %d x %d patches of %d", name, *teacher.grid, teacher.embed_dim)
        return teacher

    sources = [section.model, str(section.image_size)]
    if section.is_timm:
        sources = [str(section.weights), section.model, str(section.layer), str(section.image_size)]
    return _opened(job, section, load, _facts_of_patches, sources)


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
        grid=config.grid,
        width=teacher.embed_dim,
        context_length=config.context_length,
        logit_scale=teacher.logit_scale,
        config=config.to_json(),
    )


def _opened(
    job: Job,
    section: TeacherSection,
    load: Callable[[], Any],
    facts_of: Callable[..., TeacherFacts],
    sources: list[str],
) -> LazyTeacher:
    """Args: sources: the teacher's file or folder, and whatever else of the recipe says which teacher it is."""
    if section.store is None:
        loaded = load()
        teacher = LazyTeacher(facts_of(loaded, with_fingerprint=False), load)
        teacher.__dict__["loaded"] = loaded
        return teacher
    if not job.world.is_main:
        return LazyTeacher(gather_objects(None)[0], load)
    folder = required_store_path(section.store, job.recipe.data)
    stamp = [_stamp(sources[0]), *sources[1:]]
    facts = _remembered(folder, stamp)
    teacher = LazyTeacher(facts, load) if facts is not None else None
    if teacher is None:
        loaded = load()
        facts = facts_of(loaded, with_fingerprint=True)
        teacher = LazyTeacher(facts, load)
        teacher.__dict__["loaded"] = loaded
        _remember(folder, stamp, facts)
    gather_objects(facts)
    return teacher


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
    """The draws a run with this store sees."""
    return Views(store.views, store.seed, specs)


def _remembered(folder: Path, stamp: list[Any]) -> TeacherFacts | None:
    """The teacher that a store was last used with, if its files have not changed since."""
    try:
        found = json.loads((folder / _SEEN).read_text(encoding="utf-8"))
        if found["stamp"] != json.loads(json.dumps(stamp)) or None in stamp:
            return None
        facts = found["facts"]
        return TeacherFacts(**(facts | {"grid": tuple(facts["grid"])}))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(folder: Path, stamp: list[Any], facts: TeacherFacts) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _SEEN, {"stamp": stamp, "facts": asdict(facts)})
    except OSError as error:  # a complete store may be read where nothing can be written
        log.warning("%s could not be written: %s; the teacher is read again next time", folder / _SEEN, error)


def _stamp(source: str) -> str | None:
    """Changes with any file of a teacher; None where there is no file, as for a preset's random weights."""
    path = Path(source).expanduser()
    if not path.exists():
        return None
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    weights = [file for file in files if file.suffix not in (".log", ".jsonl", ".png")]
    stats = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in weights]
    return hashlib.sha256(repr((str(path.resolve()), stats)).encode()).hexdigest()
