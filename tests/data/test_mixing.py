from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evatool.data.train.mixing import Mix, MixPhase

MODES = ["samples", "alternating", "weighted-batches"]


def mix(mode: str, *phases: tuple[int, tuple[float, ...]], seed: int = 0, batch: int = 32) -> Mix:
    return Mix(seed, mode, [MixPhase(*phase) for phase in phases], batch)


@given(
    mode=st.sampled_from(MODES),
    weights=st.lists(st.lists(st.floats(0.01, 10), min_size=3, max_size=3), min_size=1, max_size=3),
    starts=st.lists(st.integers(1, 3000), min_size=2, max_size=2, unique=True),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=25, deadline=None)
def test_each_source_is_read_in_its_own_order_without_a_gap(
    mode: str, weights: list[list[float]], starts: list[int], seed: int
) -> None:
    phases = list(zip([0, *sorted(starts)], map(tuple, weights), strict=False))
    mixed = mix(mode, *phases, seed=seed)
    sources, own = mixed(np.arange(4096))
    for source in range(3):
        assert own[sources == source].tolist() == list(range(int((sources == source).sum())))
    for position in (0, 1, 31, 32, 1000, 1024, 3001):
        assert mixed.counts_before(position).tolist() == np.bincount(sources[:position], minlength=3).tolist()
    apart = [mixed(np.arange(at, at + 7)) for at in range(0, 700, 7)]
    assert np.concatenate([a for a, _ in apart]).tolist() == sources[:700].tolist()
    assert np.concatenate([b for _, b in apart]).tolist() == own[:700].tolist()


def test_sample_level_mixing_keeps_the_ratio_in_every_batch() -> None:
    sources, _ = mix("samples", (0, (1.6, 0.4)))(np.arange(1024 * 200))
    by_block = sources.reshape(200, 1024).mean(1)
    assert abs(by_block - 0.2).max() < 1.01 / 1024
    by_batch = sources.reshape(-1, 256).mean(1)
    assert abs(by_batch - 0.2).max() < 0.12  # drawn without replacement from its block: standard deviation 0.022
    assert abs(sources.mean() - 0.2) < 1e-5
    assert abs(np.corrcoef(sources[:-1], sources[1:])[0, 1]) < 0.02


def test_a_rare_source_is_not_lost_to_rounding() -> None:
    sources, _ = mix("samples", (0, (1e5, 1.0)))(np.arange(1024 * 300))
    assert abs(int(sources.sum()) - 3.07) <= 1


def test_alternating_takes_whole_batches_in_turn() -> None:
    sources, own = mix("alternating", (0, (1.0, 1.0)))(np.arange(32 * 10))
    assert sources.reshape(10, 32).tolist() == [[step % 2] * 32 for step in range(10)]
    assert own.reshape(10, 32)[4].tolist() == list(range(64, 96))


def test_weighted_batches_are_drawn_by_weight() -> None:
    sources, _ = mix("weighted-batches", (0, (8.0, 2.0)))(np.arange(32 * 4000))
    by_batch = sources.reshape(4000, 32)
    assert (by_batch == by_batch[:, :1]).all()
    assert abs(by_batch[:, 0].mean() - 0.2) < 0.02  # standard error 0.006
    runs = np.diff(np.flatnonzero(np.diff(by_batch[:, 0])))
    assert runs.max() > 10  # independent draws: not in turn


@pytest.mark.parametrize("mode", MODES)
def test_weights_change_at_the_stated_sample(mode: str) -> None:
    mixed = mix(mode, (0, (1.0, 1.0, 0.0)), (960, (0.0, 1.0, 1.0)), (1911, (0.0, 0.0, 3.0)))
    sources, own = mixed(np.arange(3000))
    assert set(sources[:960].tolist()) == {0, 1}
    assert set(sources[960:1920].tolist()) == {1, 2}
    assert set(sources[1920:].tolist()) == {2}  # 1911 is inside a batch: from the next one on
    for source in range(3):
        assert own[sources == source].tolist() == list(range(int((sources == source).sum())))


@pytest.mark.parametrize("mode", MODES)
def test_far_positions_cost_no_more(mode: str) -> None:
    start = time.process_time()
    mixed = mix(mode, (0, (1.6, 0.4)), (4_000_000_000, (0.5, 0.5)), batch=32_768)
    sources, own = mixed(5_000_000_000 + np.arange(1000))
    assert time.process_time() - start < 1.0
    assert len(set(zip(sources.tolist(), own.tolist(), strict=True))) == 1000
    expected = 4e9 * (0.8 if mode != "alternating" else 0.5) + 0.5e9
    assert abs(own[sources == 0].mean() / expected - 1) < 0.01 if (sources == 0).any() else True
