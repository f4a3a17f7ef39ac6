from __future__ import annotations

import math

import pytest
import torch
from tiny_clip import make_batch, tiny_clip

from evatool.objective.build import build_objective
from evatool.objective.clip import encode_pair
from evatool.objective.terms import contrastive
from evatool.recipe.schema import FixedTemperature, InfoNceObjective, SigmoidObjective


def test_objective_reports_loss_accuracy_and_temperature() -> None:
    model = tiny_clip()
    losses = build_objective(InfoNceObjective(), model)(make_batch(6))
    assert set(losses) == {"loss", "i2t_top1", "t2i_top1", "logit_scale"}
    assert all(value.shape == () for value in losses.values())
    assert float(losses["logit_scale"]) == pytest.approx(1 / 0.07, rel=1e-5)
    losses["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_temperature_has_bounds_under_its_parameters_name() -> None:
    objective = build_objective(InfoNceObjective(), tiny_clip())
    ((name, (low, high)),) = objective.parameter_bounds.items()
    assert name in dict(objective.named_parameters())
    assert (math.exp(low), math.exp(high)) == (1.0, pytest.approx(100.0))


def test_a_fixed_temperature_is_set_and_not_learned() -> None:
    model = tiny_clip()
    objective = build_objective(InfoNceObjective(temperature=FixedTemperature(value=0.01)), model)
    losses = objective(make_batch(6))
    losses["loss"].backward()
    assert float(losses["logit_scale"]) == pytest.approx(100, rel=1e-6)
    assert (model.logit_scale.requires_grad, model.logit_scale.grad) == (False, None)
    assert objective.parameter_bounds == {}, "an engine holds bounds of what it steps"
    assert "model.logit_scale" in objective.state_dict(), "whoever loads the model needs it"


def test_a_sigmoid_objective_starts_where_the_recipe_says() -> None:
    model = tiny_clip()
    objective = build_objective(SigmoidObjective(), model)
    losses = objective(make_batch(6))
    assert set(losses) == {"loss", "i2t_top1", "t2i_top1", "logit_scale", "logit_bias"}
    assert float(losses["logit_scale"]) == pytest.approx(10, rel=1e-6)
    assert float(losses["logit_bias"]) == -10
    losses["loss"].backward()
    assert all(p.grad is not None for p in objective.parameters())
    assert set(objective.state_dict()) - {f"model.{name}" for name in model.state_dict()} == {"logit_bias"}


@pytest.mark.parametrize("name", ["infonce", "sigmoid"])
@pytest.mark.parametrize("positives", ["pair", "equal-captions"])
def test_equal_captions_reach_the_loss(name: str, positives: str, monkeypatch: pytest.MonkeyPatch) -> None:
    section = {"infonce": InfoNceObjective, "sigmoid": SigmoidObjective}[name](positives=positives)
    seen = []
    monkeypatch.setattr(contrastive, f"{name}_loss", lambda *given: (seen.append(given[-1]) or given[0].sum(), {}))
    batch = make_batch(6, num_captions=3)
    build_objective(section, tiny_clip())(batch)
    assert seen == [None if positives == "pair" else batch.caption_id]


def test_the_loss_is_of_float32_features_under_autocast() -> None:
    objective = build_objective(InfoNceObjective(temperature=FixedTemperature()), tiny_clip())
    batch = make_batch(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image, text = encode_pair(objective.model, batch)
        loss = objective(batch)["loss"]
    assert (image.dtype, loss.dtype) == (torch.float32, torch.float32)
    logits = 100.0 * image @ text.T
    labels = torch.arange(6)
    expected = sum(torch.nn.functional.cross_entropy(rows, labels) for rows in (logits, logits.T)) / 2
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
