"""A loss from outside the package, with parameters of its own, through the public builders alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from length_term import OPTIM, B, LengthTerm, assert_like, build, steps
from tiny_clip import make_batch, tiny_clip
from torch import nn

from evatool.checkpoint.layout import EXTRA
from evatool.checkpoint.load import load_checkpoint
from evatool.checkpoint.save import save_run
from evatool.core.errors import RecipeError
from evatool.core.loader import BatchList
from evatool.core.param_group import ParamOwner
from evatool.core.step import StepContext
from evatool.objective.clip import ClipObjective
from evatool.objective.terms.contrastive import InfoNceTerm, SigmoidTerm
from evatool.optim.param_groups import build_param_groups
from evatool.train.control import TrainerConfig
from evatool.train.hooks.checkpoint import Checkpoints
from evatool.train.state import TrainState, resume_from
from evatool.train.trainer import Trainer

NUM_STEPS = 4


@pytest.mark.parametrize("num_chunks", [2, 4])
def test_micro_batches_train_as_the_whole_batch(num_chunks: int) -> None:
    assert_like(steps("single", 0, num_chunks), steps("single", 0, 1))


def test_the_loss_is_the_weighted_sum_and_reaches_every_parameter() -> None:
    objective, _, _ = build(weight=((0, 2.0), (100, 0.0)))
    batch = make_batch(B)
    for samples_seen, weight in ((0, 2.0), (50, 1.0), (200, 0.0)):
        step = StepContext(samples_seen=samples_seen)
        losses = objective(batch, step)
        expected = losses["contrastive_loss"] + weight * losses["length_loss"]
        assert float(losses["loss"].detach()) == pytest.approx(float(expected), rel=1e-6)
        assert objective.changing_weights(step) == {"length_loss": weight}
    losses["loss"].backward()
    assert all(param.grad is not None for param in objective.parameters())


# -------------------------------------------------------------------------------------- trainer, checkpoint, resume


def trainer(run_dir: Path, num_steps: int, resumes: bool = False) -> Trainer:
    objective, groups, engine = build()
    state = TrainState(seed=1)
    batch = make_batch(B)
    images = [batch.image.roll(shift, 0) for shift in range(NUM_STEPS)]
    loader = BatchList([replace(batch, image=image) for image in images], B)
    if resumes:
        state = resume_from(load_checkpoint(run_dir / "step_00000002"), engine, groups)
        loader.position = state.position
    save = partial(save_run, run_dir, model_config={"task": "clip"}, resolved_toml="a = 1\n", keep=9)
    return Trainer(
        TrainerConfig(num_steps=num_steps, global_batch_size=B, log_every=1),
        objective=objective,
        engine=engine,
        loader=loader,
        groups=groups,
        schedule=lambda step: 1.0,
        hooks=[Checkpoints(save, 2)],
        state=state,
    )


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", NUM_STEPS)
    whole.fit()
    trainer(tmp_path / "parts", 2).fit()
    resumed = trainer(tmp_path / "parts", NUM_STEPS, resumes=True)
    resumed.fit()
    states = [t.engine.model_state() | t.engine.optimizer_state() for t in (whole, resumed)]
    assert states[0].keys() == states[1].keys() >= {"length_scale", "length_head.weight", "exp_avg.length_scale"}
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert float(states[0]["length_scale"]) != 1.0, "it has learned"
    assert whole.metrics["train/length_loss"] > 0


def test_a_checkpoint_keeps_its_parts_beside_the_model(tmp_path: Path) -> None:
    trainer(tmp_path, 2).fit()
    from safetensors.torch import load_file

    assert set(load_file(tmp_path / "step_00000002" / EXTRA)) == {
        "length_scale",
        "length_head.weight",
        "length_head.bias",
        "length_unit",
    }


# -------------------------------------------------------------------------------------------------- the contract


def test_its_parameters_learn_where_it_says() -> None:
    _, groups, _ = build()
    of = {name: group for group in groups for name in group.param_names}
    assert (of["length_scale"].name, of["length_scale"].lr_scale) == ("text/lr_x0.5/no_decay", 0.5)
    assert (of["length_head.weight"].name, of["length_head.weight"].lr_scale) == ("other/decay", 1.0)
    assert {"length_head.bias", "model.logit_scale"} <= set(of["length_head.bias"].param_names)


def test_parameters_without_an_owner_are_refused() -> None:
    objective = ClipObjective(tiny_clip(), [SigmoidTerm()])
    objective.context = nn.Linear(2, 2)
    objective.model.context = nn.Linear(2, 2)  # "text." is part of "context.", but no prefix of it
    owners = {"logit_bias": ParamOwner()}
    with pytest.raises(RecipeError, match=r"4 parameters are of no tower and no loss \(.*context\.weight"):
        build_param_groups(objective.named_parameters(), OPTIM, depth_visual=1, depth_text=2, owners=owners)


def test_names_and_features_are_of_one_term() -> None:
    with pytest.raises(AssertionError, match="different parts under the name 'length_"):
        ClipObjective(tiny_clip(), [InfoNceTerm(), LengthTerm(), LengthTerm()])
    term = LengthTerm()
    ClipObjective(tiny_clip(), [InfoNceTerm(), term])
    with pytest.raises(AssertionError, match="part of an objective already"):
        ClipObjective(tiny_clip(), [term])
    batch = make_batch(B)
    batch.tokens = None
    with pytest.raises(AssertionError, match="length_loss needs tokens"):
        ClipObjective(tiny_clip(), [LengthTerm()])(batch)


def test_a_copy_is_another_objective() -> None:
    objective, _, _ = build()
    copied = copy.deepcopy(objective)
    with torch.no_grad():
        copied.length_scale.zero_()
    assert float(objective(make_batch(B))["length_loss"]) != float(copied(make_batch(B))["length_loss"])
