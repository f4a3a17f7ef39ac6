"""The source that each position of a run reads from, and the position within that source.

Pure functions of the position, so that any position costs the same and nothing has to be saved. The whole-batch modes
are EVA's (docs/reference/eva.md#clip-data): its released commands take the two parts of Merged-2B in turn, batch by
batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evatool.data.train import shuffle

_BLOCK = 1024  # positions over which the shares of sample-level mixing come out even
_FIXED_POINT = 40  # bits behind the point of a cumulative share
_CHUNK = 1 << 16  # batches counted at once when batches are drawn by weight


@dataclass(frozen=True)
class MixPhase:
    """Weights of all sources from position `start` on; 0 for a source that is not read."""

    start: int
    weights: tuple[float, ...]


class Mix:
    """Maps positions of the run to (source, position within that source).

    Args:
        seed: seed of the draws.
        mode: the recipe's `data.mixing`.
        phases: by ascending start, the first at 0; starts are rounded up to whole batches.
        global_batch_size: samples of a batch over all ranks, for the whole-batch modes.
    """

    def __init__(self, seed: int, mode: str, phases: Sequence[MixPhase], global_batch_size: int) -> None:
        batch = global_batch_size
        starts = [-(-phase.start // batch) * batch for phase in phases]
        self.num_sources = len(phases[0].weights)
        self._phases: list[_Phase] = []
        base = np.zeros(self.num_sources, dtype=np.int64)
        for number, (start, phase) in enumerate(zip(starts, phases, strict=True)):
            kind = _KINDS[mode]
            self._phases.append(kind(seed, number, start, phase.weights, base, batch))
            if number + 1 < len(starts):
                base = self._phases[-1].counts_before(starts[number + 1])
        self._starts = np.array(starts, dtype=np.int64)

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source numbers and positions within the sources, both int64 (B,)."""
        if self.num_sources == 1:
            return np.zeros(len(positions), dtype=np.int64), positions
        sources, own = np.empty((2, len(positions)), dtype=np.int64)
        numbers = np.searchsorted(self._starts, positions, side="right") - 1
        for number in np.unique(numbers).tolist():
            chosen = numbers == number
            sources[chosen], own[chosen] = self._phases[number](positions[chosen])
        return sources, own

    def counts_before(self, position: int) -> np.ndarray:
        """Samples of each source at positions below this one; int64 (sources,)."""
        if self.num_sources == 1:
            return np.array([position])
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self._phases[number].counts_before(position)


class _Phase(ABC):
    """One stretch of the run with fixed weights."""

    def __init__(
        self, seed: int, number: int, start: int, weights: Sequence[float], base: np.ndarray, batch: int
    ) -> None:
        self.seed, self.number, self.start, self.base, self.batch = seed, number, start, base, batch
        self.weights = np.array(weights, dtype=np.float64) / sum(weights)

    @abstractmethod
    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each position, and its number within that source."""

    @abstractmethod
    def counts_before(self, position: int) -> np.ndarray:
        """Samples taken from each source before `position`."""


class _SampleMix(_Phase):
    """Each block of 1,024 positions holds every source in its share, in an order drawn for the block.

    The share of the first b blocks is the exact one rounded to a whole sample, so nothing drifts over billions.
    """

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sources, own = np.empty((2, len(positions)), dtype=np.int64)
        blocks, slots = np.divmod(positions - self.start, _BLOCK)
        for block in np.unique(blocks).tolist():
            chosen = blocks == block
            block_sources, block_own = self._block(block)
            sources[chosen], own[chosen] = block_sources[slots[chosen]], block_own[slots[chosen]]
        return sources, own

    def counts_before(self, position: int) -> np.ndarray:
        block, slot = divmod(position - self.start, _BLOCK)
        sources, _ = self._block(block)
        inside = np.bincount(sources[:slot], minlength=len(self.weights))
        return np.asarray(self.base + self._shares(block) + inside)

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        before = self._shares(block)
        bounds = np.cumsum(self._shares(block + 1) - before)
        drawn = shuffle.shuffled(_BLOCK, self.seed, self.number, block)
        sources = np.searchsorted(bounds, drawn, side="right")
        own = np.empty(_BLOCK, dtype=np.int64)
        for source in np.unique(sources).tolist():
            mine = sources == source
            own[mine] = self.base[source] + before[source] + np.arange(int(mine.sum()))
        return sources, own

    def _shares(self, blocks: int) -> np.ndarray:
        """Samples of each source in the first `blocks` blocks.

            end of source j = floor(1024 blocks * (w_0 + ... + w_j))        share of j = end of j - end of j - 1

        Each end is rounded down once, however many blocks there are: no error of rounding adds up.
        """
        cumulative = [round(float(share) * (1 << _FIXED_POINT)) for share in np.cumsum(self.weights)]
        cumulative[-1] = 1 << _FIXED_POINT
        # Python's integers: blocks * 2^50 would leave 64 bits.
        ends = [(blocks * _BLOCK * share) >> _FIXED_POINT for share in cumulative]
        return np.diff(np.array([0, *ends], dtype=np.int64))


class _Alternating(_Phase):
    """Whole batches in turn from the sources whose weight is not 0."""

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        active = np.flatnonzero(self.weights)
        batches, slots = np.divmod(positions - self.start, self.batch)
        sources = active[batches % len(active)]
        return sources, self.base[sources] + batches // len(active) * self.batch + slots

    def counts_before(self, position: int) -> np.ndarray:
        active = np.flatnonzero(self.weights)
        batches, slots = divmod(position - self.start, self.batch)
        counts = self.base.copy()
        counts[active] += (batches + len(active) - 1 - np.arange(len(active))) // len(active) * self.batch
        counts[active[batches % len(active)]] += slots
        return counts


class _WeightedBatches(_Phase):
    """Each batch from one source, drawn with its weight as probability, by the number of the batch."""

    def __init__(
        self, seed: int, number: int, start: int, weights: Sequence[float], base: np.ndarray, batch: int
    ) -> None:
        super().__init__(seed, number, start, weights, base, batch)
        self._before = [np.zeros(len(weights), dtype=np.int64)]  # batches of each source before each chunk

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sources, own = np.empty((2, len(positions)), dtype=np.int64)
        batches, slots = np.divmod(positions - self.start, self.batch)
        for step in np.unique(batches).tolist():
            chosen = batches == step
            source = int(self._drawn(step, step + 1)[0])
            sources[chosen] = source
            own[chosen] = self.base[source] + int(self._batches_before(step)[source]) * self.batch + slots[chosen]
        return sources, own

    def counts_before(self, position: int) -> np.ndarray:
        batches, slots = divmod(position - self.start, self.batch)
        counts = self.base + self._batches_before(batches) * self.batch
        counts[self._drawn(batches, batches + 1)[0]] += slots
        return np.asarray(counts)

    def _batches_before(self, step: int) -> np.ndarray:
        chunk = step // _CHUNK
        while len(self._before) <= chunk:
            begin = (len(self._before) - 1) * _CHUNK
            self._before.append(self._before[-1] + self._count(begin, begin + _CHUNK))
        return np.asarray(self._before[chunk] + self._count(chunk * _CHUNK, step))

    def _count(self, begin: int, end: int) -> np.ndarray:
        return np.bincount(self._drawn(begin, end), minlength=len(self.weights))

    def _drawn(self, begin: int, end: int) -> np.ndarray:
        batches = np.arange(begin, end)
        keys = shuffle.sample_keys(self.seed, np.full(len(batches), self.number), batches)
        draws = shuffle.uniforms(keys, shuffle.STREAM_DRAW, 1)[:, 0]
        last = int(np.flatnonzero(self.weights)[-1])  # where rounding leaves the sum of the weights below 1
        return np.minimum(np.searchsorted(np.cumsum(self.weights), draws, side="right"), last)


_KINDS: dict[str, type[_Phase]] = {
    "samples": _SampleMix,
    "alternating": _Alternating,
    "weighted-batches": _WeightedBatches,
}
