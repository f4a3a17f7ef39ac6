"""The schedule of docs/reference/eva.md#clip-settings, step by step."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evatool.core.errors import RecipeError
from evatool.optim.schedules import build_schedule, constant_cooldown, warmup_cosine, warmup_steps_of
from evatool.recipe.load import resolve_table
from evatool.recipe.schema import ScheduleSection


def test_every_step_of_a_short_run():
    """EVA-CLIP/rei/training/scheduler.py's formula, evaluated apart: 4 warm-up steps of 12, peak 2e-3."""
    expected = np.concatenate([2e-3 * np.arange(1, 5) / 4, 0.5 * (1 + np.cos(np.pi * np.arange(8) / 8)) * 2e-3])
    ours = [2e-3 * warmup_cosine(step, num_steps=12, warmup_steps=4) for step in range(12)]
    np.testing.assert_allclose(ours, expected, rtol=1e-12)
    assert ours[3] == ours[4] == 2e-3, "the last warm-up step and the first cosine step are both at the peak"


def test_floor():
    factors = [warmup_cosine(step, num_steps=10, warmup_steps=0, min_fraction=0.1) for step in range(11)]
    assert factors[0] == 1.0
    assert factors[5] == pytest.approx(0.55)
    assert factors[10] == pytest.approx(0.1)


@given(st.integers(1, 400), st.data(), st.floats(0, 1))
def test_in_range_and_without_jumps(num_steps, data, min_fraction):
    warmup_steps = data.draw(st.integers(0, num_steps))
    factors = [
        warmup_cosine(step, num_steps=num_steps, warmup_steps=warmup_steps, min_fraction=min_fraction)
        for step in range(num_steps)
    ]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[:warmup_steps] == sorted(factors[:warmup_steps])
    assert factors[warmup_steps:] == sorted(factors[warmup_steps:], reverse=True)
    largest = max((abs(a - b) for a, b in itertools.pairwise(factors)), default=0.0)
    steepest = max(1 / max(warmup_steps, 1), np.pi / 2 / max(num_steps - warmup_steps, 1))
    assert largest <= steepest + 1e-12


def test_lengths_in_samples():
    section = ScheduleSection(warmup_samples=2500, min_lr_fraction=0.2)
    assert warmup_steps_of(section, num_steps=100, global_batch_size=1000) == 2
    assert warmup_steps_of(section, num_steps=1, global_batch_size=1000) == 1
    factor = build_schedule(section, num_steps=100, global_batch_size=1000)
    assert [factor(0), factor(1), factor(2)] == [0.5, 1.0, 1.0]
    assert factor(99) == warmup_cosine(99, num_steps=100, warmup_steps=2, min_fraction=0.2)


def test_constant_then_cooldown():
    """open_clip's `const_lr_cooldown`, step by step: 2 warm-up steps, the peak, 4 steps down, 10 in all."""
    settings = {"num_steps": 10, "warmup_steps": 2, "cooldown_steps": 4}
    factors = [constant_cooldown(step, **settings) for step in range(10)]
    assert factors == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    squared = [constant_cooldown(step, **settings, power=2.0, min_fraction=0.2) for step in range(10)]
    assert squared[6:] == pytest.approx([1.0, 0.2 + 0.8 * 0.75**2, 0.2 + 0.8 * 0.5**2, 0.2 + 0.8 * 0.25**2])


@given(st.integers(1, 400), st.data(), st.floats(0, 1), st.floats(0.25, 4))
def test_cooldown_is_in_range_and_only_falls(num_steps, data, min_fraction, power):
    warmup_steps = data.draw(st.integers(0, num_steps))
    cooldown_steps = data.draw(st.integers(0, num_steps - warmup_steps))
    ends = {"num_steps": num_steps, "warmup_steps": warmup_steps, "cooldown_steps": cooldown_steps}
    factors = [constant_cooldown(step, **ends, power=power, min_fraction=min_fraction) for step in range(num_steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[warmup_steps:] == sorted(factors[warmup_steps:], reverse=True)
    assert factors[warmup_steps : num_steps - cooldown_steps] == [1.0] * (num_steps - cooldown_steps - warmup_steps)


def test_a_recipe_chooses_the_schedule():
    table = {
        "data": {"train": "x"},
        "model": {"preset": "EVA02-CLIP-toy"},
        "optim": {"visual": {"lr": 1e-3}, "text": {"lr": 1e-3}},
        "schedule": {"kind": "constant-cooldown", "warmup_samples": 20, "cooldown_samples": 40},
        "train": {"samples_seen": 100, "global_batch_size": 10},
    }
    section = resolve_table(table, "train-clip").recipe.schedule
    factor = build_schedule(section, num_steps=10, global_batch_size=10)
    assert [factor(step) for step in (0, 1, 6, 7, 9)] == [0.5, 1.0, 1.0, 0.75, 0.25]
    assert warmup_steps_of(section, num_steps=10, global_batch_size=10) == 2
    table["schedule"]["cooldown_samples"] = 90
    with pytest.raises(RecipeError, match=r"cooldown_samples = 90 together are longer than the run"):
        resolve_table(table, "train-clip")
    table["schedule"] = {"warmup_samples": 20, "cooldown_samples": 40}
    with pytest.raises(RecipeError, match=r'it needs schedule.kind = "constant-cooldown"'):
        resolve_table(table, "train-clip")
