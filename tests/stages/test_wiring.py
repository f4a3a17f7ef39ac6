from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from evatool.core.errors import RecipeError
from evatool.recipe.load import list_recipes, load_recipe
from evatool.runs import chain
from evatool.stages.training import build as wiring
from evatool.stages.training.mim_images import CELL, GAP, HIDDEN_COLOR, LABEL_WIDTH, Look, colors_of, draw_sheet

FULL_CHAIN = ["train-clip", "pretrain-mim", "train-clip-mim", "distill"]


@pytest.mark.parametrize(("world_size", "expected"), [(24, "120, 144"), (256, "256")])
def test_a_batch_that_does_not_divide_names_the_nearest(world_size: int, expected: str) -> None:
    recipe = load_recipe("demo/train-clip", overrides=["train.global_batch_size=128"]).recipe
    with pytest.raises(RecipeError) as error:
        wiring.check_world_size(recipe, world_size)
    assert f"does not divide over {world_size} ranks; nearest that do: {expected}" in str(error.value)


def test_all_problems_of_the_world_size_come_at_once() -> None:
    recipe = load_recipe("demo/train-clip", overrides=["train.global_batch_size=127", "engine.kind=single"]).recipe
    with pytest.raises(RecipeError) as error:
        wiring.check_world_size(recipe, 2)
    assert len(error.value.problems) == 2
    wiring.check_world_size(recipe, 1)


@pytest.mark.parametrize("family", ["demo", "debug"])
def test_the_shipped_chain_leads_from_command_to_command(family: str) -> None:
    name, seen = f"{family}/train-clip", []
    while name in [f"{family}/{step}" for step in FULL_CHAIN]:
        seen.append(name.rpartition("/")[2])
        command = chain.next_in_chain(load_recipe(name).recipe, name, Path("runs") / name)
        assert command is not None
        program, stage, name = command.split()
        assert (program, load_recipe(name).recipe.stage) == ("evatool", stage)
    assert seen == FULL_CHAIN
    assert name == f"{family}/export"


@pytest.mark.parametrize(
    ("overrides", "name", "run_dir"),
    [
        ([], "demo/train-clip", "elsewhere"),
        (["data.train=mine/train"], "demo/train-clip", "runs/demo/train-clip"),
        ([], "mine", "runs/mine"),
    ],
    ids=["another folder", "other data", "no shipped recipe"],
)
def test_a_run_outside_the_chain_is_not_sent_into_it(overrides: list[str], name: str, run_dir: str) -> None:
    recipe = load_recipe("demo/train-clip", overrides=overrides).recipe
    assert chain.next_in_chain(recipe, name, Path(run_dir)) is None


def test_a_clip_without_evaluation_sets_is_sent_to_export(tmp_path: Path) -> None:
    recipe = load_recipe("demo/train-clip", overrides=[f"data.train={tmp_path}/train"]).recipe
    command = shlex.split(chain.use_clip(recipe, tmp_path / "my run"))
    assert command[:3] == ["evatool", "export", f"{tmp_path}/my run"]


def test_chain_knows_every_training_recipe_of_the_demo() -> None:
    training = {"pretrain-mim", "train-clip", "distill"}
    names = [name for name, stage, _ in list_recipes() if name.startswith("demo/") and stage in training]
    assert sorted(names) == sorted(f"demo/{step}" for step in FULL_CHAIN)


def test_sheet_hides_what_was_masked_and_colours_it_by_cosine() -> None:
    image = torch.full((2, 3, 8, 8), 200, dtype=torch.uint8)
    mask = torch.tensor([[True, False, False, False], [False, False, False, True]])
    cosine = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, -0.5]])
    red, blue = torch.tensor([1.0, 0, 0]).expand(2, 4, 3), torch.tensor([0, 0, 1.0]).expand(2, 4, 3)
    pixels = np.asarray(draw_sheet(Look(image, mask, cosine, red, blue)))

    def at(row: int, column: int, patch: int) -> tuple[int, ...]:
        y = row * (CELL + GAP) + CELL * (2 * (patch // 2) + 1) // 4
        x = LABEL_WIDTH + column * (CELL + GAP) + CELL * (2 * (patch % 2) + 1) // 4
        return tuple(int(value) for value in pixels[y, x])

    assert at(0, 0, 0) == (200, 200, 200)
    assert (at(1, 0, 0), at(1, 0, 1), at(1, 1, 3)) == (HIDDEN_COLOR, (200, 200, 200), HIDDEN_COLOR)
    best, worst = (tuple(int(v) for v in colors_of(np.array(value))) for value in (1.0, 0.0))
    assert (at(2, 0, 0), at(2, 1, 3)) == (best, worst)
    assert at(2, 0, 1) == (241, 241, 241)
    assert (at(3, 1, 2), at(4, 0, 0)) == ((255, 0, 0), (0, 0, 255))


@pytest.mark.parametrize(
    ("name", "run_dir", "command"),
    [
        ("debug/data-prepare", "runs/debug/data-prepare", "evatool train-clip debug/train-clip"),
        ("debug/data-prepare", "a b", "evatool train-clip demo/train-clip --set 'data.train=a b/train'"),
        ("photos", "runs/photos", "evatool train-clip demo/train-clip --set data.train=runs/photos/train"),
    ],
    ids=["chain", "elsewhere", "own"],
)
def test_the_command_after_data_prepare(name: str, run_dir: str, command: str) -> None:
    assert chain.use_data(name, Path(run_dir)) == command
