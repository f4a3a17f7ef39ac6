"""95 % intervals by a seeded bootstrap over samples, and paired differences between models.

With samples x_1 ... x_N, a resample b draws N of them with replacement, and the interval lies between the quantiles of
the means of B resamples (the percentile interval):

    m_b = 1/N sum_n x_(i_bn),   i_bn uniform in 1 ... N          [ q_0.025(m_1 ... m_B),  q_0.975(m_1 ... m_B) ]

m_b depends only on how often each distinct value v_j is drawn. With f_j samples of value v_j, the counts are

    (c_b1 ... c_bJ) ~ Multinomial(N; f_1 / N ... f_J / N),       m_b = 1/N sum_j c_bj v_j

so one multinomial draw over J values gives a resample's mean exactly in distribution. Hits and misses have J = 2 (a
paired difference J = 3): 1,000 resamples of 50,000 samples take milliseconds and a few kilobytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
# resamples x distinct values held at once: 2**22 int64 counts are 32 MiB
_CELLS = 2**22


@dataclass(frozen=True)
class Interval:
    """A value with the bounds of its two-sided interval, in the same unit."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """True if both bounds lie on the same side of 0: only then is a difference called a gain or a loss."""
        return self.low > 0 or self.high < 0


def bootstrap_mean(
    values: ArrayLike,
    *,
    num_resamples: int,
    seed: int,
    support: tuple[float, float] = (0.0, 1.0),
    clusters: ArrayLike | None = None,
    level: float = LEVEL,
) -> Interval:
    """Mean of per-sample values with its percentile bootstrap interval.

    Args:
        values: (N,) finite numbers within `support`, one a sample.
        num_resamples, seed: how often to resample, and the generator's seed: equal inputs give equal bounds.
        support: smallest and largest possible value. When all samples agree, resampling knows no spread; the exact
            binomial bound (the "rule of three") on the share of samples that could still differ is used instead.
        clusters: (N,) integers; samples of one cluster (captions of one picture) are drawn together.
        level: coverage of the interval.
    Raises: ValueError if there are no values, shapes differ, or a value is not finite.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, 13.3; 8.4 for clusters.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"bootstrap_mean needs a one-dimensional array with values, got shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError("bootstrap_mean got values that are not finite")
    mean = float(x.mean())
    sums, counts = (x, np.ones_like(x)) if clusters is None else _cluster_sums(x, clusters)
    if np.ptp(x) == 0:
        # all N samples agree: with a share p that could differ, that happens with probability (1 - p)^N; the largest
        # p for which it is still as likely as (1 - level) / 2 is 1 - ((1 - level) / 2)^(1 / N)
        spread = 1.0 - ((1.0 - level) / 2) ** (1.0 / sums.size)
        return Interval(mean, mean - spread * (mean - support[0]), mean + spread * (support[1] - mean))
    means = _resampled_means(sums, counts, num_resamples, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def paired_difference(
    before: ArrayLike,
    after: ArrayLike,
    *,
    num_resamples: int,
    seed: int,
    clusters: ArrayLike | None = None,
    level: float = LEVEL,
) -> Interval:
    """Mean of `after - before` over the same samples in the same order, with its interval.

    The samples are drawn once for both, so that d_n = after_n - before_n is what is resampled:

        Var(mean d) = (Var(after) + Var(before) - 2 Cov(after, before)) / N

    The covariance is what both have in common (some images are hard for every model): pairing removes it, and so tells
    models apart that their separate intervals cannot. Values lie in [0, 1] per sample.

    Raises: ValueError if the two were not measured on the same number of samples.
    """
    a, b = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"a paired difference needs the same samples: {a.shape} and {b.shape} values")
    return bootstrap_mean(
        b - a, num_resamples=num_resamples, seed=seed, support=(-1.0, 1.0), clusters=clusters, level=level
    )


def resampled_means(
    values: ArrayLike,
    *,
    num_resamples: int,
    seed: int | tuple[int, ...],
    clusters: ArrayLike | None = None,
    classes: ArrayLike | None = None,
) -> NDArray[np.float64]:
    """(num_resamples,) means of resampled samples, for figures that combine several sets.

    Args:
        classes: (N,) integers; with them a resample's figure is the mean over its classes of each class's mean.
    """
    x = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    if classes is not None:
        return _resampled_class_means(x, np.asarray(classes), num_resamples, rng)
    sums, counts = (x, np.ones_like(x)) if clusters is None else _cluster_sums(x, clusters)
    return _resampled_means(sums, counts, num_resamples, rng)


def class_mean(values: ArrayLike, classes: ArrayLike) -> float:
    """Mean over the classes that occur of each class's mean: mean-per-class recall where values are hits."""
    x, (_, index) = np.asarray(values, dtype=np.float64), np.unique(np.asarray(classes), return_inverse=True)
    return float((np.bincount(index, weights=x) / np.bincount(index)).mean())


def bootstrap_class_mean(
    values: ArrayLike,
    classes: ArrayLike,
    *,
    num_resamples: int,
    seed: int,
    support: tuple[float, float] = (0.0, 1.0),
    level: float = LEVEL,
) -> Interval:
    """Mean over classes of the class means, with its percentile bootstrap interval over samples of all classes.

    Classes that a resample does not draw are left out of it. Arguments and errors as `bootstrap_mean`.
    """
    x = np.asarray(values, dtype=np.float64)
    if np.ptp(x) == 0:
        return bootstrap_mean(x, num_resamples=num_resamples, seed=seed, support=support, level=level)
    means = resampled_means(x, num_resamples=num_resamples, seed=seed, classes=classes)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(class_mean(x, classes), float(low), float(high))


def quantile_interval(value: float, means: NDArray[np.float64], level: float = LEVEL) -> Interval:
    """A value with the percentile interval of its resamples."""
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def over_seeds(values: ArrayLike, sample_deviation: float, *, level: float = LEVEL) -> Interval:
    """Mean over training seeds with an interval that covers both another seed and other samples.

    Args:
        values: (S,) one figure a seed, at least two.
        sample_deviation: standard deviation of the mean over seeds when the samples are drawn again.

    Student's t with S - 1 degrees of freedom for the seeds, the normal quantile for the samples, added in squares:

        reach = sqrt( (t_(S-1) s / sqrt(S))^2 + (z sample_deviation)^2 ),   s the deviation between seeds
    Raises: ValueError with fewer than two seeds.
    """
    from scipy import stats

    x = np.asarray(values, dtype=np.float64)
    if x.size < 2:
        raise ValueError("an interval over seeds needs at least two of them")
    tail = (1 + level) / 2
    of_seeds = stats.t.ppf(tail, x.size - 1) * x.std(ddof=1) / np.sqrt(x.size)
    reach = float(np.hypot(of_seeds, stats.norm.ppf(tail) * sample_deviation))
    return Interval(float(x.mean()), float(x.mean()) - reach, float(x.mean()) + reach)


def _resampled_class_means(
    x: NDArray[np.float64], classes: NDArray[np.int64], num_resamples: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """(num_resamples,) means over classes of class means; a unit is a class k with a value v, drawn c_kv times.

    m_b = mean over classes k with draws of   sum_v c_kv v / sum_v c_kv
    """
    units, frequency = np.unique(np.stack([classes, x], axis=1), axis=0, return_counts=True)
    starts = np.flatnonzero(np.r_[True, np.diff(units[:, 0]) != 0])  # units are sorted by class
    share = frequency / frequency.sum()
    rows = max(1, _CELLS // len(units))
    means = []
    for start in range(0, num_resamples, rows):
        drawn = rng.multinomial(x.size, share, size=min(rows, num_resamples - start))
        total = np.add.reduceat(drawn * units[:, 1], starts, axis=1)
        count = np.add.reduceat(drawn, starts, axis=1)
        of_class = np.divide(total, count, out=np.zeros_like(total), where=count > 0)
        means.append(of_class.sum(axis=1) / (count > 0).sum(axis=1))
    return np.concatenate(means)


def _cluster_sums(x: NDArray[np.float64], clusters: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and number of samples of each cluster."""
    ids = np.asarray(clusters)
    if ids.shape != x.shape:
        raise ValueError(f"one cluster a sample is needed: {ids.shape} clusters, {x.shape} values")
    _, index = np.unique(ids, return_inverse=True)
    return np.bincount(index, weights=x).astype(np.float64), np.bincount(index).astype(np.float64)


def _resampled_means(
    sums: NDArray[np.float64], counts: NDArray[np.float64], num_resamples: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """(num_resamples,) means of units drawn with replacement; a unit is a sample, or a cluster of samples.

    A unit u has a sum s_u and a number of samples n_u (s_u = x_u and n_u = 1 for a sample), and is drawn c_u times:

        m_b = sum_u c_u s_u / sum_u c_u n_u          a ratio, since clusters differ in size
    """
    units, frequency = np.unique(np.stack([sums, counts], axis=1), axis=0, return_counts=True)
    share = frequency / frequency.sum()
    rows = max(1, _CELLS // len(units))
    means = []
    for start in range(0, num_resamples, rows):
        drawn = rng.multinomial(sums.size, share, size=min(rows, num_resamples - start))
        total = drawn @ units
        means.append(total[:, 0] / total[:, 1])
    return np.concatenate(means)
