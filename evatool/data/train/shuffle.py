"""Which sample is where in a run, and its random numbers: pure functions of seed and position, no state.

Position k of a source with n samples is slot i = k % n of epoch e = k // n. From a slot to its sample:

    slot i ------------> place p           streams: slot i belongs to stream i % S, and each stream reads its own
                                           stretch of the epoch; with S = 1, p = i
    place p -----------> window w          shards in the epoch's order, `window` (here 2) at a time:
                                               | s4 | s0 || s2 | s5 || s1 | s3 |
                                               0         a          b          n      starts of windows
    place p in w ------> another in w      p' = a + permute(p - a), a permutation of the window's samples
    place p' ----------> sample            the shard whose stretch holds p', and the number within it

Both permutations, that of the shards and that of a window, are computed point by point (`permute`) and never written
out, so any position costs the same. Random numbers come from a counter-based generator keyed by (seed, epoch, sample),
so that they depend neither on the process that draws them nor on what was drawn before:

    key = mix(mix(mix(seed + G) + e G + 1) + sample G + 2)      G the golden ratio in 64 bits, all modulo 2^64
    number j of stream s = mix(key + (1024 s + j) G)            a stream for each use: crop, flip, caption, mask, ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict

import numpy as np

ORDER_VERSION = 2
"""Changes whenever a seed would give another order; a run cannot go on in an order it did not begin with."""

# Streams of random numbers of one sample: each use has its own, so that turning one off leaves the others alone.
STREAM_CROP, STREAM_FLIP, STREAM_ROTATE, STREAM_COLOR, STREAM_GRAY, STREAM_CAPTION, STREAM_MASK, STREAM_DRAW = range(8)

_MASK64 = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_STREAM_LENGTH = 1024
_ROUNDS = 8
_EPOCHS_KEPT = 4
_SHARDS, _WINDOWS, _BLOCKS = 1, 2, 3  # what a permutation is of, in its key


def permute(positions: np.ndarray, size: int, *key: int) -> np.ndarray:
    """The permutation of range(size) that `key` names, applied to each of `places`; int64, in the shape of `places`.

    A Feistel network with eight rounds over the next power of two:

        value = | high | low |              as many bits as `size` - 1 has, the halves as equal as can be
        even rounds: high ^= F_r(low)       F_r(x) = mix(x + round_key_r), cut to the bits of the other half
        odd rounds:  low  ^= F_r(high)      each round undoes itself, so the whole is a bijection of the power of two

    A value that lands at `size` or above is sent through again until it lands below (Black and Rogaway 2002, "Ciphers
    with Arbitrary Finite Domains", cycle walking): still a bijection, now of range(size), and fewer than two passes on
    average, since size is more than half of the power of two. No table is needed.
    """
    bits = max(1, (size - 1).bit_length())
    low = bits // 2
    high_mask, low_mask, shift = np.uint64((1 << (bits - low)) - 1), np.uint64((1 << low) - 1), np.uint64(low)
    round_keys = [_key_of(*key, number) for number in range(_ROUNDS)]
    out = np.array(positions, dtype=np.uint64)
    if size == 1:
        return np.zeros(out.shape, dtype=np.int64)
    outside = np.arange(out.size)
    while outside.size:
        value = out[outside]
        high, rest = value >> shift, value & low_mask
        for number, round_key in enumerate(round_keys):
            with np.errstate(over="ignore"):
                if number % 2:
                    rest ^= mix(high + round_key) & low_mask
                else:
                    high ^= mix(rest + round_key) & high_mask
        value = (high << shift) | rest
        out[outside] = value
        outside = outside[value >= np.uint64(size)]
    return out.astype(np.int64)


class SampleOrder(ABC):
    """Which sample of one source stands at each position of the run within that source; a pure function, no state.

    Attributes:
        counts: samples of each shard, int64.
        num_samples: their sum.
        window: shards that are read together.
    """

    counts: np.ndarray
    num_samples: int
    window: int

    @abstractmethod
    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Sample numbers at positions, which are counted from the start of the run within this source; int64 (B,)."""

    @abstractmethod
    def draws(self, positions: np.ndarray) -> np.ndarray:
        """Numbers that tell two readings of one sample apart, int64 (B,): they choose its augmentation and caption."""

    @abstractmethod
    def replacement(self, position: int, attempt: int) -> tuple[int, int]:
        """(draw, sample) to read in place of an unreadable one; attempts count from 1."""

    @abstractmethod
    def shards_of_window(self, position: int, ahead: int = 0) -> list[int]:
        """Shards of the window that this position reads from, or of the `ahead`-th window after it."""

    @abstractmethod
    def once_per_epoch(self) -> SampleOrder:
        """The order in which epoch e holds each sample once, with draw e, whatever this order does."""


class SequentialOrder(SampleOrder):
    """The order of a stream, which is not shuffled: position k is sample k % n in epoch k // n.

    Args:
        num_samples: n.
    """

    def __init__(self, num_samples: int) -> None:
        self.num_samples, self.counts, self.window = num_samples, np.array([num_samples], dtype=np.int64), 1

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        return positions % self.num_samples

    def draws(self, positions: np.ndarray) -> np.ndarray:
        return positions // self.num_samples

    def replacement(self, position: int, attempt: int) -> tuple[int, int]:
        """A sample that was read before, because a stream cannot go far back; near its start, one that follows."""
        epoch, sample = divmod(position, self.num_samples)
        return epoch, abs(sample - attempt) % self.num_samples

    def shards_of_window(self, position: int, ahead: int = 0) -> list[int]:
        return [0]

    def once_per_epoch(self) -> SampleOrder:
        return self


class ShuffledOrder(SampleOrder):
    """The order in which one source's samples come, epoch after epoch or drawn with replacement.

    Args:
        seed: seed of the order.
        counts: samples of each shard.
        window: shards shuffled together; all of them where it is at least their number.
        streams: places of an epoch that are read side by side: slot i belongs to stream i % streams, and each stream
            reads its own stretch of the epoch's order.
        with_replacement: each slot draws a sample independently of the others, from the shards of its window, which
            are drawn in proportion to their samples; every sample has the same chance at every slot.
    """

    def __init__(
        self, seed: int, counts: np.ndarray, *, window: int, streams: int = 1, with_replacement: bool = False
    ) -> None:
        self.seed, self.counts, self.streams = seed, np.asarray(counts, dtype=np.int64), streams
        self.first = np.concatenate([[0], np.cumsum(self.counts)])
        self.num_samples = int(self.first[-1])
        self.window = min(window, len(self.counts))
        self.with_replacement = with_replacement
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        if self.with_replacement:
            return self._drawn(positions, 0)
        epochs, slots = np.divmod(positions, self.num_samples)
        in_epoch = self._stream_positions(slots)
        out = np.empty(len(in_epoch), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            out[chosen] = self._epoch(epoch).samples(in_epoch[chosen])
        return out

    def draws(self, positions: np.ndarray) -> np.ndarray:
        """The epoch; with replacement, the position itself."""
        return positions if self.with_replacement else positions // self.num_samples

    def replacement(self, position: int, attempt: int) -> tuple[int, int]:
        """(draw, sample) to read in place of an unreadable one; attempts count from 1.

        It comes from the first window of the `attempt`-th epoch after, so that spares of remote shards do not scatter
        over the whole set; with replacement, from the same window.
        """
        if self.with_replacement:
            return position, int(self._drawn(np.array([position]), attempt)[0])
        epoch, slot = divmod(position, self.num_samples)
        later = self._epoch(epoch + attempt)
        place = int(self._stream_positions(np.array([slot]))[0]) % later.first_window_size
        return epoch + attempt, int(later.samples(np.array([place]))[0])

    def shards_of_window(self, position: int, ahead: int = 0) -> list[int]:
        if self.with_replacement:
            window = int(self._drawn_windows(np.array([position]))[0]) + ahead * self.streams
            return sorted(set(self._drawn_shards(window).tolist()))
        epoch, slot = divmod(position, self.num_samples)
        epoch_order = self._epoch(epoch)
        window = epoch_order.window_of(int(self._stream_positions(np.array([slot]))[0])) + ahead
        while window >= epoch_order.num_windows:
            window, epoch = window - epoch_order.num_windows, epoch + 1
            epoch_order = self._epoch(epoch)
        return epoch_order.shards_of(window)

    def once_per_epoch(self) -> ShuffledOrder:
        return ShuffledOrder(self.seed, self.counts, window=self.window)

    def _stream_positions(self, slots: np.ndarray) -> np.ndarray:
        if self.streams == 1:
            return slots
        # n = whole S + rest: the first `rest` streams hold whole + 1 places each, the others whole.
        #   S = 3, n = 8:   slots 0 3 6 | 1 4 7 | 2 5   are places   0 1 2 | 3 4 5 | 6 7
        stream, step = slots % self.streams, slots // self.streams
        whole, rest = divmod(self.num_samples, self.streams)
        positions: np.ndarray = stream * whole + np.minimum(stream, rest) + step
        return positions

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch in self._epochs:
            self._epochs.move_to_end(epoch)
        else:
            self._epochs[epoch] = _Epoch(self.seed, epoch, self.counts, self.first, self.window)
            if len(self._epochs) > _EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _drawn_windows(self, positions: np.ndarray) -> np.ndarray:
        # Each stream has windows of its own, numbered stream, stream + S, stream + 2 S, ...; one lasts as many slots of
        # its stream as a window has samples on average.
        size = max(1, self.num_samples * self.window // len(self.counts))
        windows: np.ndarray = positions // self.streams // size * self.streams + positions % self.streams
        return windows

    def _drawn(self, positions: np.ndarray, attempt: int) -> np.ndarray:
        draws = np.full(positions.shape, attempt, dtype=np.int64)
        bits = uniforms(sample_keys(self.seed, positions, draws), STREAM_DRAW, 2)
        if self.window == len(self.counts):
            return np.minimum((bits[:, 0] * self.num_samples).astype(np.int64), self.num_samples - 1)
        out = np.empty(len(positions), dtype=np.int64)
        windows = self._drawn_windows(positions)
        for number in np.unique(windows).tolist():
            chosen = windows == number
            shards = self._drawn_shards(number)[(bits[chosen, 0] * self.window).astype(np.int64)]
            inside = (bits[chosen, 1] * self.counts[shards]).astype(np.int64)
            out[chosen] = self.first[shards] + np.minimum(inside, self.counts[shards] - 1)
        return out

    def _drawn_shards(self, window: int) -> np.ndarray:
        key = sample_keys(self.seed ^ _WINDOWS, np.array([window]), np.array([0]))
        numbers = np.concatenate([uniforms(key, stream, _STREAM_LENGTH)[0] for stream in _streams_for(self.window)])
        samples = (numbers[: self.window] * self.num_samples).astype(np.int64)
        return np.searchsorted(self.first, samples, side="right") - 1


class _Epoch:
    """The order of one epoch: two arrays as long as the list of shards."""

    def __init__(self, seed: int, epoch: int, counts: np.ndarray, first: np.ndarray, window: int) -> None:
        self.seed, self.epoch, self.first, self.window = seed, epoch, first, window
        num_shards = len(counts)
        self.shards = permute(np.arange(num_shards), num_shards, seed, epoch, _SHARDS)
        self.starts = np.concatenate([[0], np.cumsum(counts[self.shards])])
        self.window_starts = np.append(self.starts[:-1:window], self.starts[-1])
        self.num_windows = len(self.window_starts) - 1
        self.first_window_size = max(1, int(self.window_starts[1]))

    def samples(self, positions: np.ndarray) -> np.ndarray:
        windows = np.searchsorted(self.window_starts, positions, side="right") - 1
        at = np.empty(len(positions), dtype=np.int64)
        for window in np.unique(windows).tolist():
            chosen = windows == window
            start, end = int(self.window_starts[window]), int(self.window_starts[window + 1])
            at[chosen] = start + permute(
                positions[chosen] - start, end - start, self.seed, self.epoch, window, _WINDOWS
            )
        ranks = np.searchsorted(self.starts, at, side="right") - 1
        found: np.ndarray = self.first[self.shards[ranks]] + at - self.starts[ranks]
        return found

    def window_of(self, place: int) -> int:
        return int(np.searchsorted(self.window_starts, place, side="right")) - 1

    def shards_of(self, window: int) -> list[int]:
        shards: list[int] = self.shards[window * self.window : (window + 1) * self.window].tolist()
        return shards


def shuffled(size: int, *key: int) -> np.ndarray:
    """A whole permutation of range(size), int64."""
    return permute(np.arange(size), size, *key, _BLOCKS)


def sample_keys(seed: int, draws: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """uint64 key of each (draw, sample) pair under `seed`; a draw is an epoch. int64 (B,)."""
    return sample_keys_of(np.full(draws.shape, seed & _MASK64, dtype=np.uint64), draws, samples)


def sample_keys_of(seeds: np.ndarray, draws: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """uint64 key of each (draw, sample) pair, where each has its own seed, uint64 (B,)."""
    with np.errstate(over="ignore"):
        key = mix(seeds + _GOLDEN)
        key = mix(key + draws.astype(np.uint64) * _GOLDEN + np.uint64(1))
        return mix(key + samples.astype(np.uint64) * _GOLDEN + np.uint64(2))


def seed_of(seed: int, number: int) -> int:
    """The seed of one source among several, in 64 bits; the first has the run's own."""
    return (seed if number == 0 else int(_key_of(seed, number))) & _MASK64


def uniforms(keys: np.ndarray, stream: int, count: int) -> np.ndarray:
    """Numbers in [0, 1), float64 (B, count), of one stream of each key."""
    return (random_bits(keys, stream, count) >> np.uint64(11)) * 2.0**-53


def random_bits(keys: np.ndarray, stream: int, count: int) -> np.ndarray:
    """Random uint64 (B, count) of one stream of each key; count at most 1024."""
    if count > _STREAM_LENGTH:
        raise ValueError(f"{count} numbers asked of a stream of {_STREAM_LENGTH}")
    counters = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(stream * _STREAM_LENGTH)
    with np.errstate(over="ignore"):
        return mix(keys[:, None] + counters * _GOLDEN)


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray = x ^ (x >> np.uint64(31))
        return mixed


def _key_of(*parts: int) -> np.uint64:
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        with np.errstate(over="ignore"):
            key = mix(key + _GOLDEN) ^ np.uint64(part & _MASK64)
    return np.uint64(mix(key + _GOLDEN)[0])


def _streams_for(count: int) -> range:
    return range(-(-count // _STREAM_LENGTH))
