"""Where a run stands when one optimiser step is made. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepContext:
    """The step that is being made, handed to the objective and to the hooks; the same on every rank."""

    step: int = 0
    """Optimiser steps done before this one."""
    samples_seen: int = 0
    """Samples of the whole job seen before this step; schedules of losses follow it."""
    num_steps: int | None = None
    """Optimiser steps of the whole run, those before a resume too; None outside a run."""
