"""Spikes are seen against the losses before them."""

from __future__ import annotations

import math

import pytest
import torch

from evatool.train.loss_spike import SpikeGate


def losses(count: int, seed: int = 0) -> torch.Tensor:
    return 3 + 0.1 * torch.randn(count, generator=torch.Generator().manual_seed(seed))


def closed(gate: SpikeGate, values: torch.Tensor) -> list[bool]:
    found = []
    for value in values:
        factor = float(gate(value))
        assert math.isnan(factor) or factor == 1
        found.append(math.isnan(factor))
    return found


def test_a_spike_is_six_deviations_above_the_mean_of_the_window() -> None:
    gate = SpikeGate(6.0, window=16)
    values = losses(16)
    assert not any(closed(gate, values))
    mean, deviation = values.double().mean(), values.double().std()
    assert closed(gate, (mean + 6.1 * deviation).reshape(1)) == [True]
    assert closed(gate, (mean + 5.9 * deviation).reshape(1)) == [False], "the spike has not entered the window"
    assert closed(gate, torch.tensor([-100.0])) == [False], "a loss may fall as far as it likes"


def test_it_stays_open_until_the_window_is_full() -> None:
    assert not any(closed(SpikeGate(6.0, window=32), torch.tensor([1.0] * 31 + [1e9])))


def test_what_is_not_finite_does_not_enter() -> None:
    gate = SpikeGate(6.0, window=8)
    closed(gate, torch.cat([losses(8), torch.tensor([math.nan, math.nan])]))
    assert all(math.isfinite(value) for value in gate.state())
    assert closed(gate, torch.tensor([50.0])) == [True]


def test_it_goes_on_from_its_state() -> None:
    values = losses(40)
    whole = SpikeGate(1.0, window=8)  # closes often
    expected = closed(whole, values)
    first = SpikeGate(1.0, window=8)
    found = closed(first, values[:20])
    found += closed(SpikeGate(1.0, window=8, recent=first.state()), values[20:])
    assert found == expected
    assert any(expected)
    reset = SpikeGate(1.0, window=8)
    closed(reset, losses(9, seed=1))
    reset.reset(first.state())
    assert closed(reset, values[20:]) == expected[20:]


def test_without_a_limit_nothing_is_compared() -> None:
    gate = SpikeGate(None)
    assert not any(closed(gate, torch.tensor([1.0] * 200 + [1e9])))
    assert gate.state() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_factor_has_the_losss_type(dtype: torch.dtype) -> None:
    assert SpikeGate(6.0)(torch.ones((), dtype=dtype)).dtype == dtype
