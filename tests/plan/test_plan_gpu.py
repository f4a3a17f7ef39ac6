"""The script that compares plans with a GPU runs its steps, here on a CPU with a small model."""

from __future__ import annotations

import plan_gpu
import pytest
import torch

from evatool.model.presets import resolve_preset
from evatool.plan.estimate import memory


def test_steps_are_taken() -> None:
    config = resolve_preset("EVA02-CLIP-debug")
    peak, seconds = plan_gpu.measured(config, 2, "none", torch.device("cpu"))
    assert peak == 0
    assert seconds > 0


def test_every_case_is_planned() -> None:
    assert len(plan_gpu.CASES) == 9
    assert all(memory(plan_gpu.job_of_case(*case[1:])).total > 0 for case in plan_gpu.CASES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="compares with the GPU that is there")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_gpu.main() == 0
    assert "no GPU" in capsys.readouterr().out
