"""README's table of models: every number in it has a source in the code, and is what that says today."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from evatool.eval.published import published_value
from evatool.plan.hardware import hardware
from evatool.plan.job import job_of_recipe
from evatool.plan.report import make_plan
from evatool.plan.towers import count_parameters
from evatool.recipe.load import load_recipe

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in README.splitlines()
    if re.match(r"\| EVA[-\w]+ \| [\d,]+M \|", line)
]


def two_digits(value: float) -> float:
    return float(f"{value:.1e}")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_numbers_are_those_of_their_sources(row: list[str]) -> None:
    name, parameters, folder, published, ours, planned = row
    resolved = load_recipe(f"{folder.strip('`')}train-clip")
    gpus, gpu = re.search(r"\((\d+) x ([\w-]+)\)", planned).groups()  # type: ignore[union-attr]
    job = job_of_recipe(resolved.recipe, resolved.name, int(gpus))
    assert job.model.name == name
    assert int(parameters.strip("M").replace(",", "")) == round(count_parameters(job.model).total / 1e6)
    found = published_value(name, "imagenet1k", "top1", "shortest")
    assert found is not None
    assert float(published.strip(" %")) == pytest.approx(100 * found.value, abs=0.1)  # 81.9 in a paper, 81.96 in a list
    assert ours == "not trained here"
    hours = make_plan(job, hardware(gpu)).data["time"]["likely"]["gpu_hours"]
    assert float(planned.split()[0].replace(",", "")) == two_digits(hours)


def test_every_clip_model_has_a_row() -> None:
    assert len(ROWS) == 11


def test_18b_answers_in_under_a_second() -> None:
    started = time.process_time()
    resolved = load_recipe("eva-clip-18b/train-clip")
    for gpus in (8, 360):  # one that does not fit and is told what would, and the published one
        make_plan(job_of_recipe(resolved.recipe, resolved.name, gpus), hardware("a100-40"))
    assert time.process_time() - started < 1  # both
