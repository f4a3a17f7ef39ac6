"""A train-clip recipe with masked image modelling beside it: its second pass and its teacher are planned."""

from __future__ import annotations

import pytest
import torch
from joint_clip import LinearTeacher, joint_parts
from torch.utils.flop_counter import FlopCounterMode

from evatool.model.presets import resolve_preset
from evatool.plan import towers
from evatool.plan.estimate import memory, operations
from evatool.plan.job import job_of_recipe
from evatool.recipe.load import load_recipe

SINGLE_STAGE = "eva02-clip-l-14/train-clip-single-stage"


def test_operations_are_those_of_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's counter on a forward pass of the objective, without its teacher."""
    parts = joint_parts("infonce")
    parts.batch.mask[:] = False
    parts.batch.mask[:, :7] = True  # as many as a picture may have, on which the planner counts
    monkeypatch.setattr(LinearTeacher, "visual_tokens", lambda self, image: torch.zeros(len(image), 16, 12).double())
    config = parts.config
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        parts.objective.encode(parts.batch)
    sets = ["model.preset=EVA02-CLIP-debug", "objective.mim.mask_ratio=0.4375", "teacher.model=EVA02-CLIP-debug"]
    job = job_of_recipe(load_recipe("demo/train-clip", overrides=sets).recipe, "joint", 1)
    found = operations(job)
    assert job.masked == 7
    widths = config.width * 2 * 7 * (32 - 12)  # the plan's teacher has 32 features, the tiny one 12
    lengths = sorted(parts.batch.text_lengths.tolist())
    counted = counter.get_total_flops() / 8
    text = counted - (found.image - widths)
    assert towers.text_flops(config, min(lengths)) <= text <= towers.text_flops(config, max(lengths))


def test_the_published_size_counts_its_teacher_and_its_second_pass() -> None:
    recipes = [load_recipe(f"eva02-clip-l-14/{name}").recipe for name in ("train-clip", "train-clip-single-stage")]
    plain, joint = (job_of_recipe(recipe, "run", 128) for recipe in recipes)
    teacher, student = resolve_preset("EVA01-CLIP-g-14"), resolve_preset("EVA02-CLIP-L-14")
    more = operations(joint).image - operations(plain).image
    assert more == towers.mim_flops(student, 105) + 2 * 105 * student.width * teacher.embed_dim
    assert operations(joint).teacher == towers.image_flops(teacher, all_tokens=True)
    assert memory(joint).parts["teacher"] > 4 * towers.count_parameters(teacher).total
    activations = [memory(job).parts["activations"] / job.micro_batch_size for job in (plain, joint)]
    assert 1.8 < activations[1] / activations[0] < 2.2
    assert memory(joint).total < 39.4 * 2**30, "the recipe says that it fits the published card"
