"""Teachers whose features are stored: known by the store's note of their files, without reading their weights."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from evatool.core.atomic_io import write_json_atomically
from evatool.core.bounded_json import read_json
from evatool.core.own_folder import expand_user
from evatool.distributed.collectives import gather_objects
from evatool.distributed.engines.blocks import compile_blocks
from evatool.teachers.clip import LazyTeacher, TeacherFacts

log = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]

_SEEN = "teacher_seen.json"
_RANDOM_SEED = 8_191
"""Seed of a teacher with random weights: not the student's, and the same however late it is loaded."""


def open_teacher(
    read: Callable[[torch.device, Precision], Any],
    facts_of: Callable[..., TeacherFacts],
    sources: Sequence[str],
    *,
    device: torch.device,
    precision: Precision,
    compiles: bool,
    store: Path | None,
    is_main: bool,
) -> LazyTeacher:
    """A teacher, read at once; where its features are stored, read only to know which one it is, and not even for that
    if the store was last used with the same files. Every rank calls it.

    Args:
        read: reads the teacher's weights onto a device.
        facts_of: called with the teacher and `with_fingerprint`.
        sources: the teacher's file or folder, and whatever else of the recipe says which teacher it is.
        compiles: compile its blocks on a GPU.
        store: folder of the store of its features.
        is_main: this is rank 0, which looks into the folder and tells the others.
    """

    def load() -> Any:
        teacher = _reproducibly(read, device, precision)
        if device.type == "cuda" and compiles:
            compile_blocks(teacher.model, device, asked="teacher.compile = true")
        return teacher

    if store is None:
        loaded = load()
        return LazyTeacher(facts_of(loaded, with_fingerprint=False), load, loaded)
    if not is_main:
        return LazyTeacher(gather_objects(None)[0], load)
    stamp = [_stamp(sources[0]), *sources[1:]]
    facts, loaded = _remembered(store, stamp), None
    if facts is None:
        # A teacher is the same one whatever it computes in, so its fingerprint is of its weights as they were read.
        loaded = _reproducibly(read, torch.device("cpu"), "fp32")
        facts = facts_of(loaded, with_fingerprint=True)
        _remember(store, stamp, facts)
    gather_objects(facts)
    return LazyTeacher(facts, load, loaded if (device.type, precision) == ("cpu", "fp32") else None)


def _reproducibly(read: Callable[[torch.device, Precision], Any], device: torch.device, precision: Precision) -> Any:
    """A teacher with random weights is the same however late it is read, and takes no random number of the run's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RANDOM_SEED)
        return read(device, precision)


def _remembered(folder: Path, stamp: list[Any]) -> TeacherFacts | None:
    """The teacher that a store was last used with, if its files have not changed since."""
    try:
        found = read_json(folder / _SEEN)
        if found["stamp"] != json.loads(json.dumps(stamp)) or None in stamp:
            return None
        facts = found["facts"]
        return TeacherFacts(**(facts | {"grid": tuple(facts["grid"])}))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(folder: Path, stamp: list[Any], facts: TeacherFacts) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomically(folder / _SEEN, {"stamp": stamp, "facts": asdict(facts)})
    except OSError as error:  # a complete store may be read where nothing can be written
        log.warning("%s could not be written: %s; the teacher is read again next time", folder / _SEEN, error)


def _stamp(source: str) -> str | None:
    """A digest that changes with any file of a teacher; None where there is none, as for a preset's random weights."""
    path = expand_user(source)
    if not path.exists():
        return None
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    weights = [file for file in files if file.suffix not in (".log", ".jsonl", ".png")]
    stats = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in weights]
    return hashlib.sha256(repr((str(path.resolve()), stats)).encode()).hexdigest()
