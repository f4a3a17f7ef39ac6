from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evatool.data.train import shuffle
from evatool.data.train.shuffle import ShuffledOrder, permute

COUNTS = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda counts: sum(counts) > 0)


def locate(order: ShuffledOrder, sample: int) -> tuple[int, int]:
    """The shard of a sample and its number there, as `Source.locate` has them."""
    ends = np.cumsum(order.counts)
    shard = int(np.searchsorted(ends, sample, side="right"))
    return shard, sample - int(ends[shard] - order.counts[shard])


@given(size=st.integers(1, 3000), key=st.lists(st.integers(-(2**63), 2**64), min_size=1, max_size=3))
@settings(max_examples=100, deadline=None)
def test_a_permutation_visits_every_place_once(size: int, key: list[int]) -> None:
    assert sorted(permute(np.arange(size), size, *key).tolist()) == list(range(size))


@given(size=st.integers(1, 2**40), extents=st.lists(st.integers(0, 2**40), min_size=1, max_size=20), seed=st.integers())
@settings(max_examples=100, deadline=None)
def test_each_place_is_permuted_alone(size: int, extents: list[int], seed: int) -> None:
    inside = np.array([place % size for place in extents])
    together = permute(inside, size, seed)
    assert [int(permute(inside[i : i + 1], size, seed)[0]) for i in range(len(inside))] == together.tolist()
    assert (together >= 0).all()
    assert (together < size).all()
    assert (inside[:, None] == inside[None]).tolist() == (together[:, None] == together[None]).tolist()


def test_permutations_are_even_and_without_pattern() -> None:
    # Where each of 60 places goes under 4,000 keys: 67 times to each place, standard deviation 8.
    images = np.stack([permute(np.arange(60), 60, 7, key) for key in range(4000)])
    counts = np.stack([np.bincount(images[:, place], minlength=60) for place in range(60)])
    assert abs(counts - 4000 / 60).max() < 6 * 8
    # Neighbours do not stay neighbours: the step from one to the next is each of the 59 others equally often.
    steps = np.bincount(((images[:, 1:] - images[:, :-1]) % 60).ravel(), minlength=60)
    assert steps[0] == 0
    assert abs(steps[1:] / steps.sum() - 1 / 59).max() < 0.002
    small = {tuple(permute(np.arange(4), 4, key).tolist()) for key in range(2000)}
    assert len(small) == 24


@given(
    counts=COUNTS,
    window=st.integers(1, 14),
    streams=st.integers(1, 7),
    seed=st.integers(0, 2**64),
    epoch=st.integers(0, 10**6),
)
@settings(max_examples=150, deadline=None)
def test_every_epoch_has_every_sample_once(counts: list[int], window: int, streams: int, seed: int, epoch: int) -> None:
    source = ShuffledOrder(seed, np.array(counts), window=window, streams=streams)
    n = sum(counts)
    positions = epoch * n + np.arange(n)
    found = source(positions)
    assert sorted(found.tolist()) == list(range(n))
    assert source.draws(positions).tolist() == [epoch] * n
    for position, sample in zip(positions.tolist()[:10], found.tolist(), strict=False):
        shard, number = locate(source, sample)
        assert sum(counts[:shard]) + number == sample
        assert 0 <= number < counts[shard]
        assert shard in source.shards_of_window(position)


def test_shuffling_stays_inside_a_window_of_shards() -> None:
    source = ShuffledOrder(3, np.full(40, 25), window=8)
    shards = np.array([locate(source, sample)[0] for sample in source(np.arange(1000)).tolist()])
    windows = [set(shards[start : start + 200].tolist()) for start in range(0, 1000, 200)]
    assert all(len(window) == 8 for window in windows)
    assert len(set().union(*windows)) == 40
    assert [sorted(window) for window in windows] == [sorted(source.shards_of_window(0, k)) for k in range(5)]
    assert source.shards_of_window(999, 1) == source.shards_of_window(1000)  # the next epoch's first
    assert len(set(shards[:30].tolist())) == 8  # mixed within, not shard after shard


def test_a_stream_reads_its_own_stretch() -> None:
    counts = np.full(64, 10)
    source = ShuffledOrder(1, counts, window=4, streams=4)
    samples = source(np.arange(640))
    shards_of = [{locate(source, s)[0] for s in samples[stream::4].tolist()} for stream in range(4)]
    assert [len(shards) for shards in shards_of] == [16] * 4
    assert len(set().union(*shards_of)) == 64


def test_order_is_fixed_for_all_versions() -> None:
    # A resumed run must go on in the order it began with, whatever numpy is installed by then.
    assert shuffle.ORDER_VERSION == 2
    assert permute(np.arange(8), 8, 0, 0).tolist() == FIXED[0]
    assert ShuffledOrder(1, np.array([3, 4, 5]), window=2)(np.arange(24)).tolist() == FIXED[1]
    drawn = ShuffledOrder(1, np.array([3, 4, 5]), window=2, with_replacement=True)
    assert drawn(np.arange(12)).tolist() == FIXED[2]


FIXED = [
    [7, 1, 2, 4, 3, 5, 6, 0],
    [6, 1, 3, 4, 2, 5, 0, 7, 9, 10, 8, 11, 0, 6, 5, 2, 4, 3, 1, 9, 11, 8, 7, 10],
    [11, 6, 5, 3, 6, 9, 9, 5, 6, 6, 6, 3],
]


def test_spares_come_from_the_first_window_of_the_next_epoch() -> None:
    counts = np.full(20, 30)
    source = ShuffledOrder(5, counts, window=4)
    first_window = set(source.shards_of_window(600))
    spares = [source.replacement(position, 1) for position in range(0, 600, 7)]
    assert {draw for draw, _ in spares} == {1}
    assert {locate(source, sample)[0] for _, sample in spares} <= first_window
    assert len({sample for _, sample in spares}) > 60  # 86 spares out of 120 samples
    assert source.replacement(3, 2)[0] == 2
    whole = ShuffledOrder(5, counts, window=20)
    spares = [whole.replacement(position, 1)[1] for position in range(600)]
    assert sorted(spares) == list(range(600))  # with one window no two bad samples share a spare
    assert spares == whole(600 + np.arange(600)).tolist()


@pytest.mark.parametrize("window", [3, 40])
def test_with_replacement_every_sample_has_the_same_chance(window: int) -> None:
    counts = np.array([5, 10, 15, 20] * 10)
    source = ShuffledOrder(2, counts, window=window, with_replacement=True)
    found = source(np.arange(200_000))
    assert (source.draws(np.arange(5)) == np.arange(5)).all()
    hits = np.bincount(found, minlength=500)
    # 400 hits a sample; windows of 3 shards make them come in bunches of about 3.
    assert abs(hits.mean() - 400) < 1e-9
    assert hits.std() < (25 if window == 40 else 80)
    shares = [hits[source.first[i] : source.first[i + 1]].sum() for i in range(40)]
    assert abs(np.array(shares) / 200_000 - counts / 500).max() < 0.01
    assert len(set(found[:500].tolist())) < 450  # some twice
    if window == 3:
        inside = [locate(source, sample)[0] in source.shards_of_window(i) for i, sample in enumerate(found[:300])]
        assert all(inside)
    draw, spare = source.replacement(17, 1)
    assert (draw, spare) != (17, int(found[17]))


def test_seeking_in_two_billion_samples_takes_no_time() -> None:
    counts = np.full(200_000, 10_000)
    counts[::7] -= 13
    start = time.process_time()
    source = ShuffledOrder(0, counts, window=16, streams=8)
    assert 1.99e9 < source.num_samples < 2e9
    at_five_billion = source(5_000_000_000 + np.arange(512))
    seconds = time.process_time() - start
    assert seconds < 1.0
    assert len(set(at_five_billion.tolist())) == 512
    held = sum(epoch.shards.nbytes + epoch.starts.nbytes for epoch in source._epochs.values())
    assert held < 8 * 2**20  # by shards, not by samples


def test_epochs_and_seeds_differ() -> None:
    counts = np.array([20, 30])
    orders = {
        ShuffledOrder(seed, counts, window=2)(epoch * 50 + np.arange(50)).tobytes()
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


def test_random_numbers_depend_on_the_sample_and_not_on_its_company() -> None:
    epochs, samples = np.arange(6) // 3, np.array([4, 5, 6, 4, 5, 6])
    keys = shuffle.sample_keys(3, epochs, samples)
    assert len(set(keys.tolist())) == 6
    alone = shuffle.sample_keys(3, epochs[4:5], samples[4:5])
    assert (shuffle.uniforms(keys, 2, 7)[4] == shuffle.uniforms(alone, 2, 7)[0]).all()
    assert (shuffle.uniforms(keys, 2, 3) == shuffle.uniforms(keys, 2, 7)[:, :3]).all()
    assert not (shuffle.uniforms(keys, 2, 7) == shuffle.uniforms(keys, 1, 7)).any()


def test_random_numbers_are_uniform_and_independent() -> None:
    keys = shuffle.sample_keys(0, np.repeat(np.arange(20), 1000), np.tile(np.arange(1000), 20))
    draws = np.concatenate([shuffle.uniforms(keys, stream, 2) for stream in (0, 1, 6)], axis=1)
    assert draws.min() >= 0
    assert draws.max() < 1
    # 20,000 draws a column: standard errors are 0.002 of the mean and 0.007 of a correlation
    assert abs(draws.mean(0) - 0.5).max() < 0.01
    assert abs(np.histogram(draws, bins=20, range=(0, 1))[0] / draws.size - 0.05).max() < 0.003
    assert abs(np.corrcoef(draws.T) - np.eye(6)).max() < 0.035
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.035
