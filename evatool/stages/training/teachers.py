"""Frozen teachers: what is known of one without its weights, and the weights once a picture has no features yet."""

# B batch, S input side in pixels, N patches, T width of the features

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evatool.core.errors import RecipeError
from evatool.data.feature_store.spec import StoreSpec, Views
from evatool.distributed.collectives import gather_objects
from evatool.distributed.engines.amp import own_precision
from evatool.distributed.engines.blocks import compile_blocks
from evatool.inference.loaded_clip import DTYPES, LoadedClip, Precision, load_clip
from evatool.model.config import ModelConfig
from evatool.recipe.schema.data import TrainDataSection
from evatool.recipe.schema.teacher import (
    TIMM_PREFIX,
    PatchTeacherSection,
    StoreSection,
    TeacherSection,
    store_path,
)
from evatool.runs.run_dir import write_json
from evatool.stages.training.build import Job
from evatool.teachers.timm import TimmTeacher, load_timm_teacher, resize_grid

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

    def __init__(self, facts: TeacherFacts, load: Callable[[], Any], loaded: Any = None) -> None:
        self.facts, self._load, self._loaded = facts, load, loaded

    @property
    def loaded(self) -> Any:
        """The teacher itself."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

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
        with own_precision(image):
            return self.loaded.encode_image(image)


class PatchTeacher:
    """Patch features of a teacher on the student's grid."""

    def __init__(self, teacher: LazyTeacher, grid: tuple[int, int]) -> None:
        self.teacher, self.grid = teacher, grid

    def visual_tokens(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, N, T) float32."""
        with own_precision(image):
            return resize_grid(self.teacher.loaded.visual_tokens(image), self.teacher.facts.grid, self.grid)


def open_clip_teacher(job: Job, section: TeacherSection) -> LazyTeacher:
    """The CLIP that `section` names; every rank calls it. With a store it is read only to know who it is, and not even
    for that where the store was made with the same files.

    Raises: CheckpointError, UsageError as `load_clip`; RecipeError where the store has no folder.
    """

    def read(device: torch.device, precision: Precision) -> LoadedClip:
        teacher = load_clip(section.model, device=device, precision=precision)
        log.info("teacher: %s, %s, %s", teacher.config.name, precision, teacher.source)
        return teacher

    return _opened(job, section, read, _facts_of_clip, [section.model])


def open_patch_teacher(job: Job, section: PatchTeacherSection) -> LazyTeacher:
    """The CLIP or timm model whose patch features are learned; as `open_clip_teacher`."""

    def read(device: torch.device, precision: Precision) -> LoadedClip | TimmTeacher:
        size = section.image_size
        if not section.is_timm:
            clip = load_clip(section.model, device=device, precision=precision, image_size=size)
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
        grid=config.grid,
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
    """Args: sources: the teacher's file or folder, and whatever else of the recipe says which teacher it is."""
    device = job.world.device
    precision = precision_of(section, device)

    def load() -> Any:
        teacher = _reproducibly(read, device, precision)
        if device.type == "cuda" and section.compile:
            compile_blocks(teacher.model, device, asked="teacher.compile = true")
        return teacher

    if section.store is None:
        loaded = load()
        return LazyTeacher(facts_of(loaded, with_fingerprint=False), load, loaded)
    if not job.world.is_main:
        return LazyTeacher(gather_objects(None)[0], load)
    folder = required_store_path(section.store, job.recipe.data)
    stamp = [_stamp(sources[0]), *sources[1:]]
    facts, loaded = _remembered(folder, stamp), None
    if facts is None:
        # A teacher is the same one whatever it computes in, so its fingerprint is of its weights as they were read.
        loaded = _reproducibly(read, torch.device("cpu"), "fp32")
        facts = facts_of(loaded, with_fingerprint=True)
        _remember(folder, stamp, facts)
    gather_objects(facts)
    return LazyTeacher(facts, load, loaded if (device.type, precision) == ("cpu", "fp32") else None)


def precision_of(section: TeacherSection, device: torch.device) -> Precision:
    """What the teacher computes in."""
    if section.precision != "auto":
        return section.precision
    return "bf16" if device.type == "cuda" else "fp32"


def _reproducibly(read: Callable[[torch.device, Precision], Any], device: torch.device, precision: Precision) -> Any:
    """A teacher with random weights is the same however late it is read, and takes no random number of the run's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RANDOM_SEED)
        return read(device, precision)


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
