"""Training batches from shards: a pure function of (seed, position), whatever the workers and ranks.

Position p is the number of samples the whole run has consumed; it is the loader's only state. The global batch at p
holds positions p .. p + G - 1, and rank r of W every W-th of them from the r-th on.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

from torch.utils.data import Sampler

from evatool.core.batch import Batch
from evatool.core.batch_shares import samples_per_rank
from evatool.core.errors import CheckpointError, RecipeError
from evatool.core.loader import Loader
from evatool.data.feature_store.spec import Views
from evatool.data.feature_store.store import FeatureStore, open_store
from evatool.data.image.decode import fast_jpeg_decoder
from evatool.data.image.nonstandard import TrainingImages
from evatool.data.image.train_transforms import TrainTransform
from evatool.data.sources.base import SequentialSource, Source
from evatool.data.sources.in_order import InOrder
from evatool.data.sources.open import open_sources, window_of
from evatool.data.tar.index import VERSION
from evatool.data.tokenizer import Tokenizer, build_tokenizer
from evatool.data.train.bad_samples import LIMIT_FLOOR, LIMIT_FLOOR_SHARDS, BadSamples
from evatool.data.train.dataset import Made, OrderedSource, StepDataset
from evatool.data.train.drift import DRIFT_KEY, Counts, count_differences, counts_of
from evatool.data.train.masking import MaskSpec
from evatool.data.train.mixing import Mix, MixPhase
from evatool.data.train.sample_decoder import SampleDecoder
from evatool.data.train.shuffle import ORDER_VERSION, SampleOrder, SequentialOrder, ShuffledOrder, seed_of
from evatool.data.train.workers import iterate_batches
from evatool.recipe.schema import TrainDataSection

log = logging.getLogger(__name__)

CACHE_BYTES = 512 * 2**20
"""Decoded pictures are kept in memory while the whole set, in every worker process, stays below this (as uint8)."""


class TrainLoader(Loader):
    """Batches of one rank without end, from `position` on.

    Attributes:
        position: samples consumed by the run once the batch yielded last is used; set by iteration.
        num_samples: samples in all sources.
        bad: samples that could not be read so far in this process and were replaced.
        order_name: version and hash of all that the order of samples depends on besides the seed; a run must go on with
            the one it began with.
        stores: teachers' stored features, by teacher.
    """

    def __init__(
        self,
        dataset: StepDataset,
        *,
        position: int,
        section: TrainDataSection,
        order_name: str,
    ) -> None:
        self.dataset, self.position, self.section, self.order_name = dataset, position, section, order_name
        orders = [ordered.order for ordered in dataset.sources]
        self.num_samples = sum(order.num_samples for order in orders)
        self.stores: dict[str, FeatureStore] = {store.spec.name: store for store in dataset.stores}
        windowed = [order for order in orders if order.window < len(order.counts)]
        floor = max([LIMIT_FLOOR, *(LIMIT_FLOOR_SHARDS * order.num_samples // len(order.counts) for order in windowed)])
        self.bad = BadSamples(self.num_samples, floor, section.max_bad_fraction)

    def __iter__(self) -> Iterator[Batch]:
        """Batches without end; up to the end of the pass where the loader was built for one.

        Raises: BadDataLimitError beyond `max_bad_fraction`; TransientError where that comes of a store that does not
            answer, or where the loader processes die or hang.
        """
        dataset = self.dataset
        if self.section.mixing != "samples" and self.position % dataset.global_batch_size:
            raise RecipeError(
                f"position {self.position} is inside a batch of train.global_batch_size = {dataset.global_batch_size}",
                where=f'data.mixing = "{self.section.mixing}" counts whole batches',
                fix="go on with the batch size the run began with",
            )
        results = iterate_batches(
            dataset,
            self._positions,
            num_workers=self.section.num_workers,
            max_wait_sec=self.section.max_wait_sec,
        )
        try:
            for made in results:
                self._account(made)
                assert made.batch is not None, "a batch without spares passed the limit on bad samples"
                self.position = made.batch.position
                yield made.batch
        finally:
            results.close()
            for line in self.bad.summary():
                log.warning("data: %s", line)

    def counts(self) -> dict[str, float]:
        """This rank's counts of bad samples, spares and converted pictures, for the metrics; empty while there are
        none. Rank 0 has those from before a resume, too."""
        return self.bad.counts()

    @property
    def sample_counts(self) -> dict[str, list[tuple[str, int]]]:
        """Samples of each shard, by source."""
        return counts_of([ordered.source for ordered in self.dataset.sources])

    def check_order(
        self, saved: str, where: str, *, before: Counts | None = None, accepted: Sequence[str] = ()
    ) -> None:
        """Compare the order that a run was begun in with this loader's.

        Args:
            saved: name of the run's order; "" is a run's from before orders had names, and that order is gone.
            before: samples of the shards when the run was begun, where that is known.
            accepted: what `--accept-drift` names; `data.samples` and `data` let a run go on with other samples.
        Raises: CheckpointError where the order differs; RecipeError where that comes of other samples in the shards.
        """
        if saved == self.order_name:
            return
        lines = [] if before is None else count_differences(before, self.sample_counts)
        is_same_version = saved.partition(":")[0] == self.order_name.partition(":")[0]
        may_be_samples = is_same_version and (lines or before is None)
        if may_be_samples and any(f"{DRIFT_KEY}.".startswith(f"{key}.") for key in accepted):
            log.warning(
                "the shards hold other samples than when the run was begun, as accepted: %s",
                "; ".join(lines) or "which ones, it did not note",
            )
            return
        if may_be_samples and lines:
            raise RecipeError(
                "the shards hold other samples than when the run was begun",
                problems=lines,
                where=where,
                expected="the same samples: their order follows from how many there are",
                fix=f"put the data back as it was, accept another order from here on with --accept-drift {DRIFT_KEY}, "
                "or start a new run folder (model.init can take this run's weights)",
            )
        older = (
            "; if only the samples of the shards differ (members without a key are passed over since index version "
            f"{VERSION}, and were counted before), go on in the order of today's with --accept-drift {DRIFT_KEY}"
        )
        raise CheckpointError(
            f"the run was begun with samples in another order: {saved or 'version 1'}, and now {self.order_name}",
            where=where,
            expected="the same shards with the same number of samples, and the same data.window_shards and streams",
            fix="put the data back as it was, or start a new run folder (model.init can take this run's weights)"
            + (older if may_be_samples else ""),
        )

    def _positions(self) -> Sampler[int]:
        return _Positions(self.position, self.dataset.global_batch_size, self.dataset.end)

    def _account(self, made: Made) -> None:
        self.bad.add(made.bad, len(self.dataset.slots), made.num_replacements, made.converted)
        self.bad.check(no_replacement=made.batch is None)
        for place in made.damaged:
            log.warning("data: stored features are damaged and made again: %s", place)


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
    teacher_image_sizes: Sequence[int] = (),
    with_text: bool = True,
    tokenizer: Tokenizer | None = None,
    one_pass: bool = False,
    views: Views | None = None,
    sources: Sequence[Source | SequentialSource] = (),
) -> TrainLoader:
    """The training loader of one rank.

    Args:
        section: the recipe's `[data]`.
        image_size, teacher_image_sizes: sides of the student's and (where they differ) the teachers' views of one crop.
        context_length: length of the built-in tokenizer's rows, where no tokenizer is given.
        global_batch_size: samples of a step over all ranks.
        seed: seed of order, augmentation, caption choice and masks.
        position: samples consumed before, from a checkpoint.
        mask: block masks on the student's patch grid.
        with_text: tokens and caption ids; without, captions are not even read.
        one_pass: end after each sample was read once; every rank gets as many batches, and what fills the last one,
            or stands in for a bad sample, is marked in `Batch.valid`.
        views: how many draws of each sample there are, under a seed of their own, and teachers' features of them.
        sources: sources of one's own, read in place of the shards that the section lists under the same names; mixing,
            weights, phases and exact resume hold for them as for tars (docs/extending.md).
    Raises: DataError where a source is not what it should be, or a store is another's; RecipeError where the batch
        does not divide.
    """
    samples_per_rank(global_batch_size, world_size)
    if section.decode != "exact":
        fast_jpeg_decoder()  # here, so that a missing one is said once and not by every worker
    sizes = [image_size, *teacher_image_sizes]
    transform = TrainTransform(section.augment, sizes, section.decode)
    decoder = SampleDecoder(
        section.caption if with_text else None,
        section.extras or (),
        TrainingImages(section.nonstandard, section.decode, transform.min_side),
        section.image,
    )
    opened = open_sources(section, global_batch_size, sources)
    ordered = _ordered(opened, section, seed)
    if views is not None:
        ordered = [replace(source, seed=seed_of(views.seed, number)) for number, source in enumerate(ordered)]
    if with_text and tokenizer is None:
        tokenizer = build_tokenizer(context_length)
    dataset = StepDataset(
        ordered,
        Mix(seed, section.mixing, _phases(section, opened), global_batch_size),
        decoder,
        transform,
        global_batch_size=global_batch_size,
        rank=rank,
        world_size=world_size,
        tokenizer=tokenizer if with_text else None,
        masks=None if mask is None else mask.generator(),
        keep_decoded=_fit_in_memory(opened, section.num_workers),
        end=position + sum(source.num_samples for source in opened) if one_pass else None,
        num_views=None if views is None else views.count,
        stores=[] if views is None else _open_stores(views, opened, section, sizes[-1], transform, mask, with_text),
    )
    return TrainLoader(dataset, position=position, section=section, order_name=_order_name(section, ordered))


def _fit_in_memory(sources: Sequence[Source], num_workers: int) -> bool:
    """True where the decoded images of all sources may be kept, once in every loader process."""
    sizes = [source.decoded_bytes for source in sources]
    return all(n is not None for n in sizes) and sum(n or 0 for n in sizes) * max(1, num_workers) <= CACHE_BYTES


def _open_stores(
    views: Views,
    sources: Sequence[Source],
    section: TrainDataSection,
    teacher_size: int,
    transform: TrainTransform,
    mask: MaskSpec | None,
    with_text: bool,
) -> list[FeatureStore]:
    """The stores of `views`, each checked against everything that what a teacher sees depends on."""
    facts: dict[str, object] = {
        "views": views.count,
        "seed": views.seed,
        "teacher.picture": teacher_size,
        "data": [source.content_fingerprint() for source in sources],
        "data.decode": [section.decode, section.nonstandard, transform.min_side],
    }
    if section.image is not None:
        facts["data.image"] = section.image
    facts |= {f"data.augment.{key}": value for key, value in section.augment.model_dump(mode="json").items()}
    if with_text:
        caption = section.caption
        facts["data.caption"] = caption if isinstance(caption, str) else [c.model_dump(mode="json") for c in caption]
    counts = [source.shard_counts for source in sources]
    drawn = {} if mask is None else {f"mask.{key}": value for key, value in asdict(mask).items()}
    # A mask only tells which patches a row holds where it does not hold all.
    return [open_store(spec, counts, facts | drawn if spec.masked_only else facts) for spec in views.stores]


def _ordered(sources: Sequence[Source], section: TrainDataSection, seed: int) -> list[OrderedSource]:
    """Each source with the order in which the run reads it."""
    ordered = []
    for number, source in enumerate(sources):
        own_seed = seed_of(seed, number)
        order: SampleOrder
        if isinstance(source, InOrder):
            order = SequentialOrder(source.num_samples)
        else:
            order = ShuffledOrder(
                own_seed,
                source.shard_counts,
                window=window_of(source, section.window_shards),
                streams=section.streams,
                with_replacement=section.sampling == "with-replacement",
            )
        ordered.append(OrderedSource(source, order, own_seed))
        log.info("data: %s: %s, window %d", source.name, source.describe(), order.window)
    return ordered


def _phases(section: TrainDataSection, sources: Sequence[Source]) -> list[MixPhase]:
    """Weights of all sources by phase; by number of samples where the recipe gives none."""
    given = [source.weight for source in section.sources or []] or [None]
    first = tuple(
        float(source.num_samples if weight is None else weight) for weight, source in zip(given, sources, strict=True)
    )
    if section.mixing == "alternating":
        first = tuple(float(weight > 0) for weight in first)
    later = [
        MixPhase(phase.from_samples, tuple(phase.weights.get(source.name, 0.0) for source in sources))
        for phase in section.phases or []
    ]
    return [MixPhase(0, first), *later]


def _order_name(section: TrainDataSection, sources: Sequence[OrderedSource]) -> str:
    """Version, and a hash of everything but the seed and the batch size that the order depends on."""
    parts: list[object] = [section.sampling, section.mixing, section.streams]
    parts += [phase.model_dump_json() for phase in section.phases or []]
    for ordered in sources:
        parts += [ordered.source.fingerprint(), ordered.order.window]
    if len(sources) > 1:
        parts += [source.weight for source in section.sources or []]
    return f"{ORDER_VERSION}:{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


class _Positions(Sampler[int]):
    """First positions of the global batches, from `start` on; up to `end` where there is one."""

    def __init__(self, start: int, step: int, end: int | None) -> None:
        self.start, self.step, self.end = start, step, end

    def __iter__(self) -> Iterator[int]:
        position = self.start
        while self.end is None or position < self.end:
            yield position
            position += self.step
