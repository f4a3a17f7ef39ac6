from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from evatool.data import order


@given(seed=st.integers(-(2**63), 2**64), epoch=st.integers(0, 10**6), n=st.integers(1, 500))
@settings(max_examples=100, deadline=None)
def test_every_epoch_visits_every_sample_once(seed: int, epoch: int, n: int) -> None:
    assert sorted(order.epoch_order(seed, epoch, n)) == list(range(n))


def test_order_is_fixed_for_all_versions() -> None:
    # A resumed run must go on in the order it began with, whatever numpy is installed by then.
    assert order.epoch_order(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert order.epoch_order(1, 5, 8).tolist() == [3, 5, 6, 1, 2, 7, 0, 4]


def test_epochs_and_seeds_differ() -> None:
    orders = {order.epoch_order(seed, epoch, 50).tobytes() for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_random_numbers_depend_on_the_sample_and_not_on_its_company() -> None:
    epochs, samples = np.arange(6) // 3, np.array([4, 5, 6, 4, 5, 6])
    keys = order.sample_keys(3, epochs, samples)
    assert len(set(keys.tolist())) == 6
    alone = order.sample_keys(3, epochs[4:5], samples[4:5])
    assert (order.uniforms(keys, 2, 7)[4] == order.uniforms(alone, 2, 7)[0]).all()
    assert (order.uniforms(keys, 2, 3) == order.uniforms(keys, 2, 7)[:, :3]).all()
    assert not (order.uniforms(keys, 2, 7) == order.uniforms(keys, 1, 7)).any()


def test_random_numbers_are_uniform_and_independent() -> None:
    keys = order.sample_keys(0, np.repeat(np.arange(20), 1000), np.tile(np.arange(1000), 20))
    draws = np.concatenate([order.uniforms(keys, stream, 2) for stream in (0, 1, 6)], axis=1)
    assert draws.min() >= 0
    assert draws.max() < 1
    # 20,000 draws a column: standard errors are 0.002 of the mean and 0.007 of a correlation
    assert abs(draws.mean(0) - 0.5).max() < 0.01
    assert abs(np.histogram(draws, bins=20, range=(0, 1))[0] / draws.size - 0.05).max() < 0.003
    assert abs(np.corrcoef(draws.T) - np.eye(6)).max() < 0.035
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.035
