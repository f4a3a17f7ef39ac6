"""One place counts a step: planner and throughput meter agree, and models without a formula are traced."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from evatool.core.errors import RecipeError
from evatool.model.presets import resolve_preset
from evatool.plan import costs, towers, traced
from evatool.plan.costs import StepWork, flops_per_sample, step_costs
from evatool.plan.estimate import memory, operations
from evatool.plan.job import job_of_recipe
from evatool.plan.locked import Locks
from evatool.recipe.load import load_recipe
from evatool.teachers.trace import trace_timm_teacher

MODEL = "test_efficientnet"  # timm's own for tests: a third of a million parameters


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def planned(*overrides: str):
    return job_of_recipe(load_recipe("demo/pretrain-mim", list(overrides)).recipe, "run", 1)


def test_the_meter_counts_what_the_planner_counts() -> None:
    """The same recipe through both, with whole captions, which the meter counts."""
    clip = load_recipe("demo/train-clip").recipe
    config = resolve_preset(clip.model.preset)
    meter = flops_per_sample(clip, config)
    assert meter == step_costs(StepWork("train-clip", config)).flops
    assert meter == 3 * (towers.image_flops(config) + towers.text_flops(config))
    sets = ['teacher.model="EVA02-CLIP-L-14"']
    mim = load_recipe("demo/pretrain-mim", sets).recipe
    job = planned(*sets)
    assert flops_per_sample(mim, job.model, teachers=job.teachers, masked=job.masked) == operations(job).model


def test_the_meter_counts_the_masked_pass_and_the_teacher_of_one_stage() -> None:
    recipe = load_recipe("eva02-clip-l-14/train-clip-single-stage").recipe
    student, teacher = resolve_preset("EVA02-CLIP-L-14"), resolve_preset("EVA01-CLIP-g-14")
    found = flops_per_sample(recipe, student, teachers=[teacher], masked=105, predict_dim=1024)
    alone = 3 * (towers.image_flops(student) + towers.text_flops(student))
    masked = 3 * (towers.mim_flops(student, 105) + 2 * 105 * student.width * 1024)
    assert found == alone + masked + towers.image_flops(teacher, all_tokens=True)


def test_a_frozen_tower_has_no_backward_pass() -> None:
    config = resolve_preset("EVA02-CLIP-B-16")
    image, text = step_costs(StepWork("train-clip", config, locks=Locks("all"))).parts
    assert image.backward < image.forward / 100
    assert text.backward == 2 * text.forward


def test_parts_are_those_of_the_memory_and_of_the_operations() -> None:
    job = planned('teacher.model="EVA02-CLIP-L-14"')
    found = costs.step_costs(job.step)
    assert operations(job).teacher == found.teachers[0].forward
    assert memory(job).parts["activations"] == job.micro_batch_size * found.parts[0].activations.kept


def test_a_traced_teacher_is_what_torch_counts_on_the_model_itself() -> None:
    model = timm.create_model(MODEL).eval()
    size = model.pretrained_cfg["input_size"][-1]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        features = model.forward_intermediates(
            torch.zeros(1, 3, size, size), indices=[-1], stop_early=True, intermediates_only=True
        )[0]
    found = trace_timm_teacher(MODEL)
    assert found["flops"] == counter.get_total_flops() > 1e6
    assert found["params"] == sum(param.numel() for param in model.parameters())
    assert (found["embed_dim"], found["num_patches"]) == (features.shape[1], features.shape[2] * features.shape[3])
    assert 3 * size**2 < found["working_numbers"] < 20 * 3 * size**2


def test_a_timm_teacher_is_planned_and_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = planned(f'teacher.model="timm/{MODEL}"')
    direct = trace_timm_teacher(MODEL)
    assert operations(first).teacher == direct["flops"]
    assert first.model.predict_dim == direct["embed_dim"]
    assert memory(first).parts["teacher"] > 4 * direct["params"]
    assert any("there is no formula" in note for note in first.notes)

    def no_process(*args: object, **kwargs: object) -> None:
        raise AssertionError("a cached figure starts no process")

    monkeypatch.setattr(subprocess, "run", no_process)
    assert planned(f'teacher.model="timm/{MODEL}"') == first
    with pytest.raises(AssertionError, match="starts no process"):
        planned(f'teacher.model="timm/{MODEL}"', "teacher.layer=1")


@pytest.mark.slow
def test_a_damaged_figure_is_counted_again() -> None:
    found = traced.traced_timm_model(MODEL, None, None)
    path = traced.cache_file(MODEL, None, None)
    path.write_text("{", encoding="utf-8")
    assert traced.traced_timm_model(MODEL, None, None) == found


def test_a_model_that_timm_does_not_have_is_refused_with_its_name() -> None:
    with pytest.raises(RecipeError, match="timm has no model 'no_such_net'") as caught:
        planned('teacher.model="timm/no_such_net"')
    assert "teacher.model" in (caught.value.where or "")
