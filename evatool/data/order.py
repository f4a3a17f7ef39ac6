"""Which sample is where in a run, and its random numbers: pure functions of seed and position, no state.

Position i of a run is slot i % n of epoch i // n. Random numbers are drawn from a counter-based generator keyed by
(seed, epoch, sample), so that they depend neither on the process that draws them nor on what was drawn before.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

# Streams of random numbers of one sample: each use has its own, so that turning one off leaves the others alone.
STREAM_CROP, STREAM_FLIP, STREAM_ROTATE, STREAM_COLOR, STREAM_GRAY, STREAM_CAPTION, STREAM_MASK = range(7)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_STREAM_LENGTH = 1024


@lru_cache(maxsize=6)
def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """Permutation of `num_samples` for this epoch, int64, read-only.

    Sorted by Philox's raw output, which numpy guarantees across versions (`Generator.permutation` it does not).
    """
    bits = np.random.Philox(key=np.array([seed & _MASK64, epoch], dtype=np.uint64)).random_raw(num_samples)
    order = np.argsort(bits, kind="stable")
    order.flags.writeable = False
    return order


def sample_keys(seed: int, epochs: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """uint64 key of each (epoch, sample) pair under `seed`; epochs and samples int64 (B,)."""
    with np.errstate(over="ignore"):
        key = _mix(np.full(epochs.shape, seed & _MASK64, dtype=np.uint64) + _GOLDEN)
        key = _mix(key + epochs.astype(np.uint64) * _GOLDEN + np.uint64(1))
        return _mix(key + samples.astype(np.uint64) * _GOLDEN + np.uint64(2))


def uniforms(keys: np.ndarray, stream: int, count: int) -> np.ndarray:
    """Numbers in [0, 1), float64 (B, count), of one stream of each key."""
    return (random_bits(keys, stream, count) >> np.uint64(11)) * 2.0**-53


def random_bits(keys: np.ndarray, stream: int, count: int) -> np.ndarray:
    """Random uint64 (B, count) of one stream of each key; count at most 1024."""
    if count > _STREAM_LENGTH:
        raise ValueError(f"{count} numbers asked of a stream of {_STREAM_LENGTH}")
    counters = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(stream * _STREAM_LENGTH)
    with np.errstate(over="ignore"):
        return _mix(keys[:, None] + counters * _GOLDEN)


_MASK64 = (1 << 64) - 1


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
