"""Evaluation sets from a local folder, opened through clip-benchmark so that its users' sets work as they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from evatool.data.pictures import BadPicture, decode_rgb
from evatool.data.shards import MANIFEST, PICTURE_MEMBERS, TarReader, read_manifest
from evatool.errors import DataError

ALLOWED_MEMBERS = frozenset((*PICTURE_MEMBERS, "cls", "txt", "json"))
"""Members by the last part of their extension. clip-benchmark hands a set to webdataset's `.decode()`, which would
unpickle members of other names; a set that has any is refused before it gets there."""

KINDS = ("classification", "retrieval")


@dataclass(frozen=True)
class EvalSet:
    """An opened evaluation set.

    Attributes:
        kind: "classification" or "retrieval".
        classnames, templates: prompts with `{c}` in place of the name; empty for retrieval.
        loader: batches (pictures (B, 3, S, S), class numbers (B,)), or (pictures, B lists of captions) for
            retrieval; can be iterated again and keeps its order.
        samples: the same samples in the same order, for pictures in reports.
    """

    name: str
    kind: str
    classnames: list[str]
    templates: list[str]
    loader: Iterable[Any]
    samples: TarReader

    @property
    def num_samples(self) -> int:
        """Pictures in the set."""
        return len(self.samples)

    def picture(self, i: int) -> np.ndarray:
        """Picture i of the loader's order as uint8 (H, W, 3). Raises: DataError if it cannot be decoded."""
        members = self.samples.read(i, PICTURE_MEMBERS)
        try:
            return decode_rgb(next(iter(members.values()), b""))
        except BadPicture as err:
            raise DataError(f"picture {self.samples.keys[i]} of evaluation set {self.name}: {err}") from err

    def caption(self, i: int) -> str:
        """Caption i for retrieval, else the class name."""
        members = self.samples.read(i, ("txt", "cls"))
        if "txt" in members:
            return members["txt"].decode("utf-8")
        return self.classnames[int(members["cls"])]


def open_eval_set(
    folder: Path, *, transform: Callable[[Image.Image], Tensor], batch_size: int, split: str = "test"
) -> EvalSet:
    """Open the set in `folder`.

    Args:
        transform: a picture (any mode) to (3, S, S).
        batch_size: pictures a batch; the last one may be smaller.
    Raises: DataError where a file of the layout is missing, a tar is damaged, or a member is not allowed.
    """
    from clip_benchmark.datasets.builder import build_dataset

    kind, tars = _check_layout(folder, split)
    samples = TarReader(tars)
    _check_members(folder, split, samples, kind)
    task = "zeroshot_classification" if kind == "classification" else "zeroshot_retrieval"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="WebDataset.shardshuffle")  # unset is what is meant: in order
        dataset = build_dataset(
            f"wds/{folder.name}", root=str(folder), transform=transform, split=split, download=False, task=task
        )
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=0,  # webdataset 1.x refuses fewer tars than workers, and a small set is one tar
        collate_fn=None if kind == "classification" else _with_captions,
        generator=torch.Generator(),  # leaves the process's generator alone
    )
    return EvalSet(folder.name, kind, list(dataset.classes or []), list(dataset.templates or []), loader, samples)


def _with_captions(samples: list[tuple[Tensor, list[str]]]) -> tuple[Tensor, list[list[str]]]:
    return torch.stack([picture for picture, _ in samples]), [captions for _, captions in samples]


def _check_layout(folder: Path, split: str) -> tuple[str, list[Path]]:
    """Kind and tars of a set. clip-benchmark itself goes on without class names and fails much later."""
    count_file = folder / split / "nshards.txt"
    if not count_file.is_file():
        raise DataError(
            f"{folder} is not an evaluation set: {split}/nshards.txt is missing",
            expected="clip-benchmark's layout for `wds/` sets (docs/data.md)",
            fix="run `evatool data-prepare`, or correct the folder",
        )
    kind_file = folder / "dataset_type.txt"
    kind = kind_file.read_text(encoding="utf-8").strip().lower() if kind_file.is_file() else "classification"
    if kind not in KINDS:
        raise DataError(f"evaluation set {folder.name} is of kind {kind!r}", expected=f"one of {', '.join(KINDS)}")
    needed = [] if kind == "retrieval" else ["classnames.txt", "zeroshot_classification_templates.txt"]
    try:
        needed += [f"{split}/{number}.tar" for number in range(int(count_file.read_text(encoding="utf-8")))]
    except ValueError as err:
        raise DataError(f"{count_file} does not hold a number", expected="the number of tars") from err
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise DataError(f"evaluation set {folder.name} lacks {', '.join(missing)}", where=str(folder))
    return kind, [folder / name for name in needed if name.endswith(".tar")]


def _check_members(folder: Path, split: str, samples: TarReader, kind: str) -> None:
    label = "cls" if kind == "classification" else "txt"
    for i, key in enumerate(samples.keys):
        extensions = samples.extensions(i)
        odd = [e for e in extensions if e.rpartition(".")[2] not in ALLOWED_MEMBERS]
        if odd:
            raise DataError(
                f"evaluation set {folder.name} has a member {key}.{odd[0]} that is not read, because it may hold code",
                expected=f"members of {', '.join(sorted(ALLOWED_MEMBERS))} only",
            )
        if label not in extensions or not any(e in PICTURE_MEMBERS for e in extensions):
            raise DataError(
                f"sample {key} of evaluation set {folder.name} has members {', '.join(extensions)}",
                expected=f"a picture and a {label} member",
            )
    if not samples.keys:
        raise DataError(f"evaluation set {folder.name} has no samples", where=str(folder))
    if (folder / split / MANIFEST).is_file():
        written = read_manifest(folder / split)["num_samples"]
        if written != len(samples):
            raise DataError(
                f"evaluation set {folder.name} has {len(samples)} samples instead of the {written} of its manifest",
                where=str(folder),
                fix="run `evatool data-prepare` again into a new folder",
            )
