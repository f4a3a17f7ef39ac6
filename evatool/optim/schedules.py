"""Learning rate over the run, as a factor on the peak."""

from __future__ import annotations

import math
from collections.abc import Callable

from evatool.recipe.schema import ConstantCooldownSection, ScheduleSection

AnySchedule = ScheduleSection | ConstantCooldownSection


def warmup_cosine(step: int, *, num_steps: int, warmup_steps: int, min_fraction: float = 0.0) -> float:
    """Factor on the peak learning rate at optimiser step `step`, counted from 0.

    (step + 1) / warmup_steps during the warm-up, so the first step is not wasted and the last one is at the peak; then
    half a cosine from 1 at the first step after it to `min_fraction` just past the last step.

    Returns: in (0, 1].
    Source: EVA-CLIP/rei/training/scheduler.py (docs/reference/eva.md#clip-settings).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return min_fraction + (1.0 - min_fraction) * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))


def constant_cooldown(
    step: int,
    *,
    num_steps: int,
    warmup_steps: int,
    cooldown_steps: int,
    power: float = 1.0,
    min_fraction: float = 0.0,
) -> float:
    """Factor on the peak learning rate at optimiser step `step`, counted from 0.

    The warm-up of `warmup_cosine`, then 1, then over the last `cooldown_steps` from 1 to `min_fraction` just past the
    last step, as (what is left of the cooldown)^power.

    Returns: in (0, 1].
    Source: open_clip_train/scheduler.py `const_lr_cooldown`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    left = num_steps - step
    if left >= cooldown_steps:
        return 1.0
    share: float = (left / cooldown_steps) ** power
    return min_fraction + (1.0 - min_fraction) * share


def build_schedule(section: AnySchedule, *, num_steps: int, global_batch_size: int) -> Callable[[int], float]:
    """The recipe's schedule as a function of the step; lengths in samples become steps, rounded to the nearest."""
    warmup_steps = warmup_steps_of(section, num_steps=num_steps, global_batch_size=global_batch_size)
    ends = {"num_steps": num_steps, "warmup_steps": warmup_steps}
    match section:
        case ScheduleSection(min_lr_fraction=lowest):
            return lambda step: warmup_cosine(step, **ends, min_fraction=lowest)
        case ConstantCooldownSection(min_lr_fraction=lowest, cooldown_power=power):
            ends["cooldown_steps"] = min(num_steps, round(section.cooldown_samples / global_batch_size))
            return lambda step: constant_cooldown(step, **ends, power=power, min_fraction=lowest)


def warmup_steps_of(section: AnySchedule, *, num_steps: int, global_batch_size: int) -> int:
    """Warm-up in optimiser steps: `warmup_samples / global_batch_size` to the nearest, at most the whole run."""
    return min(num_steps, round(section.warmup_samples / global_batch_size))
