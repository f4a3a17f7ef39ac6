"""One rank's slice of a global batch, made from its first position alone: a pure function of (seed, position)."""

from __future__ import annotations

import hashlib
import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch.utils.data import Dataset

from evatool.core.batch import Batch
from evatool.data.feature_store.store import FeatureStore
from evatool.data.image.header import BadImage
from evatool.data.image.train_transforms import TrainTransform
from evatool.data.sources.base import Fields, MissingField, Source, UnreadableSample
from evatool.data.tokenizer import CaptionMemory, Tokenizer
from evatool.data.train import shuffle
from evatool.data.train.bad_samples import BadSample, Converted
from evatool.data.train.masking import MaskGenerator
from evatool.data.train.mixing import Mix
from evatool.data.train.sample_decoder import DecodedSample, SampleDecoder, choose_caption
from evatool.data.train.shuffle import SampleOrder

_MAX_SPARES = 64  # tries for one place of a batch
_MAX_REMEMBERED_BAD = 100_000  # bad samples a process remembers, so as not to read them again


@dataclass
class Made:
    """A batch as a worker hands it over, with what it met on the way.

    Attributes:
        batch: None where no replacement of a bad sample could be found.
        bad: bad samples that this worker met for the first time.
        num_replacements: samples of the batch that stand in for bad ones.
        converted: pictures of the batch that were not ordinary ones.
        damaged: rows of stored features whose checksum does not fit.
    """

    batch: Batch | None
    bad: list[BadSample] = field(default_factory=list)
    num_replacements: int = 0
    converted: list[Converted] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    def pin_memory(self) -> Made:
        """Called by the DataLoader."""
        return replace(self, batch=None if self.batch is None else self.batch.pin_memory())


@dataclass
class OrderedSource:
    """One source, and the order in which a run reads it.

    Attributes:
        seed: seed of the random numbers of its samples: the run's, or that of stored views.
    """

    source: Source
    order: SampleOrder
    seed: int


class StepDataset(Dataset[Made]):
    """Maps the first position of a global batch to this rank's slice of it, made whole in one worker.

    Rank r of W has positions r, r + W, r + 2W, ... of the batch, so that with `data.streams` each rank stays in its
    own stretch of the data.

    Args:
        sources: the sources that are mixed.
        mix: which position reads which source.
        decoder: stored fields to decoded samples.
        transform: views of a picture; the first is the student's.
        global_batch_size, rank, world_size: slice of the batch.
        tokenizer: None leaves the captions out.
        masks: None makes no masks.
        keep_decoded: keep decoded samples in memory.
        end: position from which on samples do not count: `Batch.valid` is False there. None: no end.
        num_views: epoch e of a sample has the draws of epoch e mod this; of epoch e itself where it is None.
        stores: teachers' features to read; a batch whose features are all there gets no teacher's view.
        skip_stored: make an empty batch where all features of all stores are there.
    """

    def __init__(
        self,
        sources: Sequence[OrderedSource],
        mix: Mix,
        decoder: SampleDecoder,
        transform: TrainTransform,
        *,
        global_batch_size: int,
        rank: int,
        world_size: int,
        tokenizer: Tokenizer | None,
        masks: MaskGenerator | None,
        keep_decoded: bool,
        end: int | None = None,
        num_views: int | None = None,
        stores: Sequence[FeatureStore] = (),
        skip_stored: bool = False,
    ) -> None:
        self.sources, self.mix, self.decoder, self.transform = list(sources), mix, decoder, transform
        self.global_batch_size, self.end = global_batch_size, end
        self.num_views, self.stores, self.skip_stored = num_views, list(stores), skip_stored
        self.slots = np.arange(rank, global_batch_size, world_size)
        self.tokens = None if tokenizer is None else CaptionMemory(tokenizer)
        self.masks = masks
        self._kept: dict[tuple[int, int], DecodedSample] | None = {} if keep_decoded else None
        self._bad: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._windows: dict[int, list[int]] = {}

    def __getitem__(self, position: int) -> Made:
        slots = position + self.slots
        numbers, own = self.mix(slots)
        samples, draws = np.empty((2, len(slots)), dtype=np.int64)
        for number in np.unique(numbers).tolist():
            mine = numbers == number
            samples[mine] = self.sources[number].order(own[mine])
            draws[mine] = self.sources[number].order.draws(own[mine])
            self._fetch_ahead(number, int(own[mine][-1]))
        made = Made(None)
        if self.skip_stored and len(self._stored(self._store_rows(numbers, samples, draws), made)) == len(self.stores):
            made.batch = Batch(image=torch.empty(0, 3, 0, 0), keys=[], position=position + self.global_batch_size)
            return made
        decoded, names, is_replacement = [], [], np.zeros(len(slots), dtype=bool)
        for i, (number, place) in enumerate(zip(numbers.tolist(), own.tolist(), strict=True)):
            found = self._readable(number, place, int(draws[i]), int(samples[i]), made)
            if found is None:
                return made
            is_replacement[i] = (found[0], found[1]) != (draws[i], samples[i])
            draws[i], samples[i], sample = found
            decoded.append(sample)
            names.append(self.sources[number].source.key(int(samples[i])))
            if sample.conversion is not None:
                source = self.sources[number].source
                shard, _ = source.locate(int(samples[i]))
                made.converted.append(Converted(sample.conversion, source.shard_name(shard), names[-1]))
        made.num_replacements = int(is_replacement.sum())
        seeds = np.array([source.seed for source in self.sources], dtype=np.uint64)[numbers]
        store_rows = self._store_rows(numbers, samples, draws)
        stored = self._stored(store_rows, made)
        views = draws if self.num_views is None else draws % self.num_views
        has_all = bool(self.stores) and len(stored) == len(self.stores)
        made.batch = self._assemble(decoded, shuffle.sample_keys_of(seeds, views, samples), with_teacher=not has_all)
        if self.stores:
            made.batch.stored, made.batch.store_rows = stored, torch.from_numpy(store_rows)
        made.batch.keys = names
        made.batch.position = position + self.global_batch_size
        made.batch.sample = torch.from_numpy(slots)
        if self.end is not None:
            made.batch.valid = torch.from_numpy((slots < self.end) & ~is_replacement)
        return made

    def _store_rows(self, numbers: np.ndarray, samples: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Source, shard, number and view under which stores keep these samples, int64 (B, 4)."""
        if not self.stores:
            return np.empty((len(samples), 0), dtype=np.int64)
        inside = [self.sources[n].source.locate(s) for n, s in zip(numbers.tolist(), samples.tolist(), strict=True)]
        shards, rows = np.array(inside, dtype=np.int64).T
        return np.stack([numbers, shards, rows, draws % (self.num_views or 1)], axis=1)

    def _stored(self, store_rows: np.ndarray, made: Made) -> dict[str, torch.Tensor]:
        """Stored features by teacher; a teacher is left out where any of its rows is missing."""
        found = {}
        for store in self.stores:
            rows = store.read(store_rows)
            made.damaged += store.damaged
            store.damaged.clear()
            if rows is not None:
                found[store.spec.name] = rows
        return found

    def _fetch_ahead(self, number: int, own_position: int) -> None:
        """Let the source prefetch the shards of this window and the next when a window is entered."""
        source, order = self.sources[number].source, self.sources[number].order
        if not source.can_prefetch:
            return
        window = order.shards_of_window(own_position)
        if self._windows.get(number) != window:
            self._windows[number] = window
            source.prefetch([*window, *order.shards_of_window(own_position, 1)])

    def _readable(
        self, number: int, place: int, draw: int, sample: int, made: Made
    ) -> tuple[int, int, DecodedSample] | None:
        """(draw, sample number, sample) for this place: its own sample, or the first replacement that can be read."""
        for attempt in range(_MAX_SPARES):
            if attempt:
                draw, sample = self.sources[number].order.replacement(place, attempt)
            decoded = self._decoded(number, sample, made)
            if decoded is not None:
                return draw, sample, decoded
        return None

    def _decoded(self, number: int, sample: int, made: Made) -> DecodedSample | None:
        """A sample of source `number`; None where it is bad, which `made` then says once."""
        if (number, sample) in self._bad:
            return None
        if self._kept is not None and (number, sample) in self._kept:
            return self._kept[number, sample]
        source = self.sources[number].source
        try:
            decoded = self._read(source, sample)
        except (BadImage, UnreadableSample) as found:
            err = source.explain(sample, found) if isinstance(found, MissingField) else found
            is_whole_shard = isinstance(err, UnreadableSample) and err.is_whole_shard
            name = source.shard_name(source.locate(sample)[0])
            made.bad.append(BadSample(number, sample, name, source.key(sample), err.cause, err.detail, is_whole_shard))
            if not is_whole_shard:  # a lost shard may come back, and the reader remembers it
                self._bad[number, sample] = None
                if len(self._bad) > _MAX_REMEMBERED_BAD:
                    self._bad.popitem(last=False)
            return None
        if self._kept is not None:
            self._kept[number, sample] = decoded
        return decoded

    def _read(self, source: Source, sample: int) -> DecodedSample:
        """One sample, decoded. Raises: BadImage, UnreadableSample."""
        try:
            return self.decoder(self._fields(source, sample), source.max_pixels)
        except UnreadableSample as err:
            if err.is_whole_shard or not source.doubt(sample):
                raise
        return self.decoder(self._fields(source, sample), source.max_pixels)

    def _fields(self, source: Source, sample: int) -> Fields:
        """A sample's fields; where one cannot be read that only would have told more, those that are needed."""
        try:
            return source.read(sample, self.decoder.fields)
        except UnreadableSample as err:
            if err.is_whole_shard or self.decoder.fields == self.decoder.needed:
                raise
            return source.read(sample, self.decoder.needed)

    def _assemble(self, decoded: list[DecodedSample], keys: np.ndarray, *, with_teacher: bool = True) -> Batch:
        views = self.transform([d.image for d in decoded], keys, None if with_teacher else 1)
        teacher_image = views[1] if len(views) > 1 else None
        batch = Batch(image=views[0], keys=[], teacher_image=teacher_image, teacher_images=views[2:] or None)
        if self.tokens is not None:
            draws = shuffle.uniforms(keys, shuffle.STREAM_CAPTION, 1)[:, 0].tolist()
            captions = [choose_caption(d, u) for d, u in zip(decoded, draws, strict=True)]
            batch.tokens = self.tokens(captions)
            batch.text_lengths = batch.tokens.argmax(dim=-1) + 1
            batch.caption_id = torch.tensor([caption_id(d.concept, c) for d, c in zip(decoded, captions, strict=True)])
        if self.masks is not None:
            seeds = shuffle.random_bits(keys, shuffle.STREAM_MASK, 1)[:, 0].tolist()
            batch.mask = torch.from_numpy(np.stack([self.masks(random.Random(s)) for s in seeds]))
        names = [extra.name for extra in self.decoder.extras]
        if names:
            batch.extras = {name: torch.stack([d.extras[name] for d in decoded]) for name in names}
        return batch


def caption_id(concept: str | None, caption: str) -> int:
    """A number that is equal for captions that count as equal: those of one concept, else those of the same words.

    Letter case and spacing do not matter, as they do not to the tokenizer. int64, a hash: the same in every process.
    """
    text = f"c:{concept}" if concept is not None else "t:" + " ".join(caption.lower().split())
    # JSON can spell a lone surrogate, which UTF-8 cannot.
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1
