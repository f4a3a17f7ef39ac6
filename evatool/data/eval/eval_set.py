"""Evaluation sets on disk as batches: clip-benchmark's `wds/` layout, image folders and Birdsnap.

clip-benchmark's own readers are not used: under webdataset 1.x they refuse fewer tars than workers, they know no
ranks, and they hand members to a decoder that unpickles. What they read is read here with the same answers.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Container, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from evatool.core.errors import DataError
from evatool.data.eval.folders import is_birdsnap, is_image_folder, open_birdsnap, open_image_folder
from evatool.data.eval.samples import Samples
from evatool.data.eval.scenes import SceneSamples
from evatool.data.eval.tars import open_tars
from evatool.data.image.decode import decode_image
from evatool.data.image.eval_transforms import EvalTransform
from evatool.data.image.header import BadImage

# B pictures of a batch, S input side in pixels, N pictures of the set, W ranks


class Transform(Protocol):
    """An encoded picture to a tensor (3, S, S)."""

    def __call__(self, data: bytes) -> Tensor: ...


@dataclass(frozen=True)
class EvalSet:
    """An opened evaluation set.

    Attributes:
        kind: "classification", "retrieval" or "localisation".
        classnames, templates: prompts with `{c}` in place of the name; empty for retrieval.
        loader: this rank's batches, see `EvalLoader`.
        samples: the encoded pictures and what is known of each, for all ranks.
    """

    name: str
    kind: str
    classnames: list[str]
    templates: list[str]
    loader: EvalLoader
    samples: Samples

    @property
    def num_samples(self) -> int:
        """Pictures in the set, over all ranks."""
        return len(self.samples)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of keys, picture sizes and labels: the same pictures in the same order with the same answers."""
        return self.samples.fingerprint

    def image(self, i: int) -> np.ndarray:
        """Picture i as uint8 (H, W, 3). Raises: DataError if it cannot be decoded."""
        try:
            return decode_image(self.samples.image(i), mode="exact")  # whatever the model was shown
        except BadImage as err:
            raise _unreadable(self.name, self.samples, i, err) from err

    def caption(self, i: int) -> str:
        """The captions of picture i, one a line, for retrieval; else the class name."""
        if self.kind == "retrieval":
            return "\n".join(self.samples.captions(i))
        return self.classnames[self.samples.label(i)]


@dataclass
class EvalLoader:
    """Batches of one rank; can be iterated again and keeps its order.

    Rank r of W holds pictures r, r + W, r + 2 W, ...: every picture exactly once over the ranks, none repeated.
    ImageSheets are decoded in threads, a batch ahead.

    Yields: (pictures (B, 3, S, S), class numbers (B,) int64); for retrieval (pictures, B lists of captions); for
    localisation (pictures, masks (B, S, S) int32: 0 background, k + 1 class k).
    """

    name: str
    kind: str
    samples: Samples
    transform: Transform
    batch_size: int
    num_threads: int = 1
    rank: int = 0
    world_size: int = 1
    indices: np.ndarray = field(init=False)
    """(n,) int64: pictures of this rank, in its order."""

    def __post_init__(self) -> None:
        self.indices = np.arange(self.rank, len(self.samples), self.world_size)

    def __len__(self) -> int:
        """Batches of this rank."""
        return math.ceil(len(self.indices) / self.batch_size)

    @property
    def most_batches(self) -> int:
        """Number of batches of the rank that has the most; ranks that work in lockstep all go through so many."""
        most_images = math.ceil(len(self.samples) / self.world_size)
        return math.ceil(most_images / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        for decoded, targets in self._decoded(None):
            yield torch.stack([image for _, image in decoded if image is not None]), targets

    def unknown(self, known: Container[bytes]) -> Iterator[tuple[list[bytes], dict[bytes, Tensor], Any]]:
        """Batches in the order of iteration, in which pictures in `known` are not decoded.

        Args:
            known: digests of encoded pictures; what is in it stays in it.
        Yields: (B digests, the pictures (3, S, S) of those that were not known when they were read, B targets).
        """
        for decoded, targets in self._decoded(known):
            yield [digest for digest, _ in decoded], {d: p for d, p in decoded if p is not None}, targets

    def _decoded(self, known: Container[bytes] | None) -> Iterator[tuple[list[tuple[bytes, Tensor | None]], Any]]:
        batches = [self.indices[i : i + self.batch_size] for i in range(0, len(self.indices), self.batch_size)]
        with ThreadPoolExecutor(self.num_threads, thread_name_prefix="decode") as pool:
            ahead = self._submit(pool, batches[0], known) if batches else []
            try:
                for batch, following in zip(batches, [*batches[1:], None], strict=True):
                    current, ahead = ahead, [] if following is None else self._submit(pool, following, known)
                    yield [future.result() for future in current], self._targets(batch)
            finally:
                for future in ahead:
                    future.cancel()

    def _submit(
        self, pool: ThreadPoolExecutor, batch: np.ndarray, known: Container[bytes] | None
    ) -> list[Future[tuple[bytes, Tensor | None]]]:
        return [pool.submit(self._decode, int(i), known) for i in batch]

    def _decode(self, i: int, known: Container[bytes] | None) -> tuple[bytes, Tensor | None]:
        """Digest of the encoded picture (empty where none is asked for), and the picture unless it is known."""
        data = self.samples.image(i)
        digest = b"" if known is None else hashlib.blake2b(data, digest_size=20).digest()
        if known is not None and digest in known:
            return digest, None
        try:
            return digest, self.transform(data)
        except BadImage as err:
            raise _unreadable(self.name, self.samples, i, err) from err

    def _targets(self, batch: np.ndarray) -> Any:
        if self.kind == "classification":
            return torch.tensor([self.samples.label(int(i)) for i in batch], dtype=torch.int64)
        if self.kind == "retrieval":
            return [self.samples.captions(int(i)) for i in batch]
        assert isinstance(self.transform, EvalTransform)  # a mask is cut as its picture is
        return torch.stack([self.transform.mask(self.samples.mask(int(i))) for i in batch])


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_eval_set(
    folder: Path,
    *,
    transform: Transform,
    batch_size: int,
    split: str = "test",
    num_threads: int = 1,
    rank: int = 0,
    world_size: int = 1,
    name: str | None = None,
    prompts: str | None = None,
) -> EvalSet:
    """Open the set in `folder`, told by what is in it: clip-benchmark's layout, Birdsnap, or a folder a class.

    Args:
        transform: an encoded picture to (3, S, S), such as `EvalTransform`.
        batch_size: pictures a batch; a rank's last one may be smaller.
        num_threads: threads that decode.
        rank, world_size: this rank's share of the pictures.
        name: in results; the folder's when absent.
        prompts: name in clip-benchmark's class names and templates, for image folders that bring none.
    Raises: DataError where a file of the layout is missing, a tar is damaged, or a member is not allowed.
    """
    name = name or folder.name
    samples: Samples
    if (folder / split / "nshards.txt").is_file():
        kind, classnames, templates, samples = open_tars(folder, split)
    elif is_birdsnap(folder):
        kind, classnames, templates, samples = open_birdsnap(folder)
    elif is_image_folder(folder, split):
        kind, classnames, templates, samples = open_image_folder(folder, split, prompts or name)
    else:
        raise DataError(
            f"{folder} is not an evaluation set: {split}/nshards.txt is missing, and there are no folders of pictures",
            expected="clip-benchmark's layout for `wds/` sets, a folder a class, or Birdsnap's files (docs/eval.md)",
            fix="run `evatool suites show SUITE --data DIR` for the command that makes it, or correct the folder",
        )
    loader = EvalLoader(name, kind, samples, transform, batch_size, num_threads, rank, world_size)
    return EvalSet(name, kind, classnames, templates, loader, samples)


def scenes_of(opened: EvalSet, name: str, *, side: int, seed: int) -> EvalSet:
    """A localisation set of scenes that are composed from the pictures of a classification set.

    Raises: DataError where the set is of another kind, or too small for one scene.
    """
    if opened.kind != "classification":
        raise DataError(f"scenes are composed of classified pictures, {opened.name} is a {opened.kind} set")
    samples = SceneSamples(opened.samples, side, seed)
    loader = replace(opened.loader, name=name, kind="localisation", samples=samples)
    return EvalSet(name, "localisation", opened.classnames, opened.templates, loader, samples)


def _unreadable(name: str, samples: Samples, i: int, err: BadImage) -> DataError:
    return DataError(
        f"picture {samples.keys[i]} of evaluation set {name} cannot be used: {err}",
        where=samples.where(i),
        expected="a JPEG, PNG or WebP picture; leaving one out would change the benchmark",
        fix="copy or convert the set again",
    )
