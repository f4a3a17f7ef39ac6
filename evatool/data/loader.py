"""Training batches from shards: a pure function of (seed, position), whatever the workers and ranks.

Position p is the number of samples the whole run has consumed; it is the loader's only state. The global batch at p
holds positions p .. p + G - 1, and rank r of W the r-th of W equal slices of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from evatool.data import order
from evatool.data.decode import Mode, decode_picture, fast_jpeg_decoder
from evatool.data.masking import BlockMaskGenerator, MaskSpec
from evatool.data.pictures import BadPicture
from evatool.data.shards import PICTURE_MEMBERS, ShardIndex
from evatool.data.tokenizer import CaptionMemory, Tokenizer, build_tokenizer
from evatool.data.transforms import TrainTransform
from evatool.errors import BadDataLimitError, RecipeError
from evatool.recipe.schema import TrainDataSection
from evatool.types import Batch

log = logging.getLogger(__name__)

CACHE_BYTES = 512 * 2**20
"""Decoded pictures are kept in memory while the whole set, in every worker process, stays below this (as uint8)."""

_MAX_SPARES = 16  # epochs searched for a spare of one bad sample
_LIMIT_FLOOR = 1000  # samples tried before a share of bad ones means anything, where the set has so many


@dataclass(frozen=True)
class Record:
    """A decoded sample: picture uint8 (3, H, W), captions to choose from, concept for equal-caption positives."""

    picture: Tensor
    captions: tuple[str, ...]
    concept: str | None


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be read."""

    sample: int
    shard: str
    key: str
    cause: str
    detail: str

    def __str__(self) -> str:
        return f"{self.shard} {self.key}: {self.cause} ({self.detail})"


@dataclass
class _Made:
    """What a worker hands over: a batch, or None where spares ran out, and the bad samples newly met on the way."""

    batch: Batch | None
    bad: list[BadSample] = field(default_factory=list)

    def pin_memory(self) -> _Made:
        """Called by the DataLoader."""
        return _Made(None if self.batch is None else self.batch.pin_memory(), self.bad)


class TrainLoader:
    """Batches of one rank without end, from `position` on.

    Attributes:
        position: samples consumed by the run once the batch yielded last is used; set by iteration.
        num_samples: samples in the set.
        bad_samples: every sample found unreadable so far in this process, replaced by spares.
    """

    def __init__(
        self,
        dataset: StepDataset,
        *,
        position: int,
        global_batch_size: int,
        num_workers: int,
        max_bad_fraction: float,
    ) -> None:
        self.dataset, self.position, self.global_batch_size = dataset, position, global_batch_size
        self.num_workers, self.max_bad_fraction = num_workers, max_bad_fraction
        self.num_samples = len(dataset.index)
        self.bad_samples: dict[int, BadSample] = {}
        self._num_tried = 0

    def __iter__(self) -> Iterator[Batch]:
        """Batches without end. Raises: BadDataLimitError beyond `max_bad_fraction`."""
        loader = DataLoader(
            self.dataset,
            batch_size=None,
            sampler=_Positions(self.position, self.global_batch_size),
            num_workers=self.num_workers,
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator(),  # its draws must not come out of the training process's generator
            pin_memory=torch.cuda.is_available(),  # so that `Batch.to` does not wait for the copy
        )
        for made in loader:
            self._account(made)
            assert made.batch is not None, "a batch without spares passed the limit on bad samples"
            self.position = made.batch.position
            yield made.batch

    def _account(self, made: _Made) -> None:
        self._num_tried += self.dataset.local_batch_size
        for bad in made.bad:
            if bad.sample not in self.bad_samples:
                self.bad_samples[bad.sample] = bad
                log.warning("bad sample replaced: %s", bad)
        base = min(self.num_samples, max(self._num_tried, _LIMIT_FLOOR))
        if made.batch is None or len(self.bad_samples) > int(self.max_bad_fraction * base + 1e-9):
            raise self._beyond_limit(base)

    def _beyond_limit(self, base: int) -> BadDataLimitError:
        causes = Counter(bad.cause for bad in self.bad_samples.values())
        counted = ", ".join(f"{count} {cause}" for cause, count in causes.most_common())
        named = [str(bad) for bad in list(self.bad_samples.values())[:5]]
        return BadDataLimitError(
            f"{len(self.bad_samples)} of {base} samples cannot be read ({counted})",
            where="\n  ".join([str(self.dataset.index.folder), *named]),
            expected=f"at most data.max_bad_fraction = {self.max_bad_fraction} of them",
            fix="prepare the data again with `evatool data-prepare`, or raise data.max_bad_fraction",
        )


class StepDataset(Dataset[_Made]):
    """Maps the first position of a global batch to this rank's slice of it, made whole in one worker.

    Args:
        index: samples.
        transform: views of a picture; the first is the student's.
        seed: of order, augmentation, caption choice and masks.
        global_batch_size, rank, world_size: slice of the batch.
        tokenizer: None leaves the captions out.
        caption: as the recipe's `data.caption`.
        masks: None makes no masks.
        keep_decoded: keep decoded samples in memory.
    """

    def __init__(
        self,
        index: ShardIndex,
        transform: TrainTransform,
        *,
        seed: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        tokenizer: Tokenizer | None,
        caption: str,
        masks: BlockMaskGenerator | None,
        keep_decoded: bool,
    ) -> None:
        self.index, self.transform, self.seed = index, transform, seed
        self.local_batch_size = global_batch_size // world_size
        self.first = rank * self.local_batch_size
        self.global_batch_size = global_batch_size
        self.tokens = None if tokenizer is None else CaptionMemory(tokenizer)
        self.caption, self.masks = caption, masks
        self.order = order.SourceOrder(seed, np.array([len(index)]), window=1)
        self._kept: dict[int, Record] | None = {} if keep_decoded else None
        self._bad: dict[int, BadSample] = {}

    def __getitem__(self, position: int) -> _Made:
        slots = position + self.first + np.arange(self.local_batch_size)
        epochs, places = np.divmod(slots, len(self.index))
        known_bad = len(self._bad)
        records, samples = [], np.empty(len(slots), dtype=np.int64)
        for i, (epoch, place) in enumerate(zip(epochs.tolist(), places.tolist(), strict=True)):
            found = self._readable(epoch, place)
            if found is None:
                return _Made(None, list(self._bad.values()))
            epochs[i], samples[i], record = found
            records.append(record)
        batch = self._assemble(records, order.sample_keys(self.seed, epochs, samples))
        batch.keys = [self.index.keys[i] for i in samples.tolist()]
        batch.position = position + self.global_batch_size
        # Only the new ones: dicts keep their order of insertion.
        return _Made(batch, list(self._bad.values())[known_bad:])

    def _readable(self, epoch: int, place: int) -> tuple[int, int, Record] | None:
        """(epoch, sample, record) of this slot; the spare of a bad sample is the same slot of the epoch after."""
        for spare_epoch in range(epoch, epoch + _MAX_SPARES):
            sample = int(self.order(np.array([spare_epoch * len(self.index) + place]))[0])
            record = self._record(sample)
            if record is not None:
                return spare_epoch, sample, record
        return None

    def _record(self, sample: int) -> Record | None:
        if sample in self._bad:
            return None
        if self._kept is not None and sample in self._kept:
            return self._kept[sample]
        try:
            record = read_record(
                self.index,
                sample,
                None if self.tokens is None else self.caption,
                self.transform.decode,
                self.transform.min_side,
            )
        except BadPicture as err:
            shard, key = self.index.shard_name(sample), self.index.keys[sample]
            self._bad[sample] = BadSample(sample, shard, key, err.cause, err.detail)
            return None
        if self._kept is not None:
            self._kept[sample] = record
        return record

    def _assemble(self, records: list[Record], keys: np.ndarray) -> Batch:
        views = self.transform([r.picture for r in records], keys)
        batch = Batch(image=views[0], keys=[], teacher_image=views[1] if len(views) > 1 else None)
        if self.tokens is not None:
            draws = order.uniforms(keys, order.STREAM_CAPTION, 1)[:, 0].tolist()
            captions = [r.captions[int(u * len(r.captions))] for r, u in zip(records, draws, strict=True)]
            batch.tokens = self.tokens(captions)
            batch.caption_id = torch.tensor([caption_id(r.concept, c) for r, c in zip(records, captions, strict=True)])
        if self.masks is not None:
            seeds = order.random_bits(keys, order.STREAM_MASK, 1)[:, 0].tolist()
            batch.mask = torch.from_numpy(np.stack([self.masks(random.Random(s)) for s in seeds]))
        return batch


def read_record(
    index: ShardIndex, sample: int, caption: str | None, decode: Mode = "fast", min_side: int | None = None
) -> Record:
    """Read and decode one sample.

    Args:
        caption: the recipe's `data.caption`; None leaves captions out.
        decode, min_side: as for `decode_picture`.

    Raises: BadPicture naming the cause: of `pictures.CAUSES`, or "unreadable", "no-picture", "bad-json", "no-caption".
    """
    try:
        members = index.read(sample)
    except OSError as err:
        raise BadPicture("unreadable", str(err)) from err
    picture = next((members[e] for e in PICTURE_MEMBERS if e in members), None)
    if picture is None:
        raise BadPicture("no-picture", f"members: {', '.join(sorted(members))}")
    # Channels last in memory, as decoded: the resize is fastest on that.
    pixels = torch.from_numpy(decode_picture(picture, index.max_pixels, decode, min_side=min_side)).permute(2, 0, 1)
    if caption is None:
        return Record(pixels, (), None)
    captions, concept = _read_captions(members, caption)
    return Record(pixels, captions, concept)


def caption_id(concept: str | None, caption: str) -> int:
    """Equal for captions that count as equal: of one concept where the sample names one, else of the same words.

    Letter case and spacing do not matter, as they do not to the tokenizer. int64, a hash: the same in every process.
    """
    text = f"c:{concept}" if concept is not None else "t:" + " ".join(caption.lower().split())
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def build_train_loader(
    section: TrainDataSection,
    *,
    image_size: int,
    context_length: int,
    global_batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    position: int = 0,
    mask: MaskSpec | None = None,
    teacher_image_size: int | None = None,
    with_text: bool = True,
    tokenizer: Tokenizer | None = None,
) -> TrainLoader:
    """The training loader of one rank.

    Args:
        section: the recipe's `[data]`.
        image_size, teacher_image_size: sides of the student's and (where given) the teacher's view of one crop.
        context_length: of the built-in tokenizer, where none is given.
        global_batch_size: samples of a step over all ranks.
        seed: of order, augmentation, caption choice and masks.
        position: samples consumed before, from a checkpoint.
        mask: block masks on the student's patch grid.
        with_text: tokens and caption ids; without, captions are not even read.
    Raises: DataError where the folder is not a finished set of shards; RecipeError where the batch does not divide.
    """
    if global_batch_size % world_size:
        near = global_batch_size // world_size * world_size
        raise RecipeError(
            f"train.global_batch_size = {global_batch_size} does not divide over {world_size} ranks",
            expected=f"a multiple of {world_size}: {', '.join(str(n) for n in (near, near + world_size) if n)}",
        )
    index = ShardIndex(section.train)
    if section.decode != "exact":
        fast_jpeg_decoder()  # here, so that a missing one is said once and not by every worker
    sizes = [image_size] if teacher_image_size is None else [image_size, teacher_image_size]
    if with_text and tokenizer is None:
        tokenizer = build_tokenizer(context_length)
    dataset = StepDataset(
        index,
        TrainTransform(section.augment, sizes, section.decode),
        seed=seed,
        global_batch_size=global_batch_size,
        rank=rank,
        world_size=world_size,
        tokenizer=tokenizer if with_text else None,
        caption=section.caption,
        masks=None if mask is None else mask.generator(),
        keep_decoded=index.decoded_bytes * max(1, section.num_workers) <= CACHE_BYTES,
    )
    return TrainLoader(
        dataset,
        position=position,
        global_batch_size=global_batch_size,
        num_workers=section.num_workers,
        max_bad_fraction=section.max_bad_fraction,
    )


def _read_captions(members: dict[str, bytes], caption: str) -> tuple[tuple[str, ...], str | None]:
    try:
        info = json.loads(members["json"]) if "json" in members else {}
        concept = info.get("concept")
        if caption == "json-captions":
            captions = tuple(info.get("captions", ()))
        else:
            captions = (members["txt"].decode("utf-8"),) if "txt" in members else ()
    except UnicodeDecodeError as err:
        raise BadPicture("bad-utf8", str(err)) from err
    except (ValueError, AttributeError, TypeError) as err:
        raise BadPicture("bad-json", str(err)) from err
    usable = tuple(c for c in captions if isinstance(c, str) and c.strip())
    if not usable:
        wanted = "a `captions` list in the json member" if caption == "json-captions" else "a txt member"
        raise BadPicture("no-caption", f"data.caption = {caption!r} needs {wanted}")
    return usable, None if concept is None else str(concept)


class _Positions(Sampler[int]):
    """First positions of the global batches, from `start` on without end."""

    def __init__(self, start: int, step: int) -> None:
        self.start, self.step = start, step

    def __iter__(self) -> Iterator[int]:
        position = self.start
        while True:
            yield position
            position += self.step


def _ignore_interrupts(worker: int) -> None:
    # Ctrl-C reaches the whole process group; the training process saves its state and ends the workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
