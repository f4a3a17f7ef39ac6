"""Every view of every sample once, for filling stores ahead of time; what is stored already is not even decoded."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from evatool.core.batch import Batch
from evatool.data.image.train_transforms import TrainTransform
from evatool.data.train.loader import TrainLoader


@dataclass(frozen=True)
class _OneSource:
    """A mix that reads one source alone."""

    number: int

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.full(len(positions), self.number, dtype=np.int64), positions


def num_rows(loader: TrainLoader) -> int:
    """Views of all samples of a training loader with stores."""
    return loader.num_samples * (loader.dataset.num_views or 1)


def missing_batches(loader: TrainLoader, sizes: Sequence[int] | None = None) -> Iterator[Batch]:
    """This rank's share of all views, source by source, as the training loader will draw them, until its end.

    Each batch has the teachers' pictures only, the first as `image`, and is empty where every store has its rows
    already. All ranks get as many batches. A bad sample's place is taken by a spare, whose row is as good as any.

    Args:
        sizes: sides of the teachers' pictures; the last of the loader's views when None.
    """
    for number in range(len(loader.dataset.sources)):
        yield from _pass_of(loader, number, loader.dataset.transform.sizes[-1:] if sizes is None else sizes)


def _pass_of(loader: TrainLoader, number: int, sizes: Sequence[int]) -> TrainLoader:
    dataset = copy.copy(loader.dataset)
    source, views = dataset.sources[number], dataset.num_views or 1
    order = source.order.once_per_epoch()  # epoch v is view v
    dataset.sources = list(dataset.sources)
    dataset.sources[number] = replace(source, order=order)
    dataset.mix = _OneSource(number)  # type: ignore[assignment]
    dataset.transform = TrainTransform(dataset.transform.section, sizes, dataset.transform.decode)
    dataset.skip_stored, dataset.end = True, order.num_samples * views
    section = loader.section.model_copy(update={"mixing": "samples"})
    return TrainLoader(dataset, position=0, section=section, order_name=loader.order_name)
