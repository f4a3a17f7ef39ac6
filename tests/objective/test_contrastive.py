from __future__ import annotations

import math

import pytest
import torch
from tiny_clip import make_batch, tiny_clip

from evatool.model.clip import build_clip
from evatool.model.presets import resolve_preset
from evatool.objective import contrastive
from evatool.objective.contrastive import ClipObjective, encode_pair, encode_text
from evatool.recipe.schema import FixedTemperature, InfoNceObjective, SigmoidObjective


def test_trimmed_text_gives_the_same_features_and_gradients() -> None:
    """Dropping the padding is exact: the tower is causal and pools at the end-of-text token."""
    model, tokens = tiny_clip().double(), make_batch(6).tokens
    assert int(tokens.argmax(dim=-1).max()) + 1 < tokens.shape[1]
    results = []
    for encode in (lambda: model.encode_text(tokens), lambda: encode_text(model, tokens)):
        output = encode()
        parameters = list(model.text.parameters())
        gradients = torch.autograd.grad((output**3).sum(), parameters)
        results.append([output.detach(), *gradients])
    for whole, trimmed in zip(*results, strict=True):
        torch.testing.assert_close(trimmed, whole, rtol=1e-11, atol=1e-13)
    assert model.text.attn_mask.shape == (tokens.shape[1], tokens.shape[1])


@pytest.mark.parametrize("longest", [3, 16], ids=["short captions", "a caption of full length"])
def test_trimming_is_exact_in_the_real_text_tower(longest: int) -> None:
    config = resolve_preset("EVA02-CLIP-debug")
    torch.manual_seed(0)
    model = build_clip(config)
    tokens = make_batch(6, context_length=config.context_length).tokens
    ends = torch.tensor([3, 2, 3, 2, 3, longest]) - 1
    tokens = torch.where(torch.arange(config.context_length) < ends[:, None], tokens.clamp(min=1, max=49406), 0)
    tokens[torch.arange(6), ends] = 49407
    with torch.no_grad():
        trimmed, whole = encode_text(model, tokens), model.encode_text(tokens)
    torch.testing.assert_close(trimmed, whole, rtol=1e-5, atol=1e-6)


def test_a_tower_that_sees_padding_gets_all_columns() -> None:
    model, tokens = tiny_clip(), make_batch(6).tokens
    model.text.attn_mask = None
    torch.testing.assert_close(encode_text(model, tokens), model.encode_text(tokens), rtol=0, atol=0)


def test_objective_reports_loss_accuracy_and_temperature() -> None:
    model = tiny_clip()
    losses = ClipObjective(model, InfoNceObjective())(make_batch(6))
    assert set(losses) == {"loss", "i2t_top1", "t2i_top1", "logit_scale"}
    assert all(value.shape == () for value in losses.values())
    assert float(losses["logit_scale"]) == pytest.approx(1 / 0.07, rel=1e-5)
    losses["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_temperature_has_bounds_under_its_parameters_name() -> None:
    objective = ClipObjective(tiny_clip(), InfoNceObjective())
    ((name, (low, high)),) = objective.parameter_bounds.items()
    assert name in dict(objective.named_parameters())
    assert (math.exp(low), math.exp(high)) == (1.0, pytest.approx(100.0))


def test_a_fixed_temperature_is_set_and_not_learned() -> None:
    model = tiny_clip()
    objective = ClipObjective(model, InfoNceObjective(temperature=FixedTemperature(value=0.01)))
    losses = objective(make_batch(6))
    losses["loss"].backward()
    assert float(losses["logit_scale"]) == pytest.approx(100, rel=1e-6)
    assert (model.logit_scale.requires_grad, model.logit_scale.grad) == (False, None)
    assert objective.parameter_bounds == {}, "an engine holds bounds of what it steps"
    assert "model.logit_scale" in objective.state_dict(), "whoever loads the model needs it"


def test_a_sigmoid_objective_starts_where_the_recipe_says() -> None:
    model = tiny_clip()
    objective = ClipObjective(model, SigmoidObjective())
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
    monkeypatch.setattr(contrastive, f"{name}_loss", lambda *given: (seen.append(given[-1]), {}))
    batch = make_batch(6, num_captions=3)
    ClipObjective(tiny_clip(), section)(batch)
    assert seen == [None if positives == "pair" else batch.caption_id]


def test_the_loss_is_of_float32_features_under_autocast() -> None:
    objective = ClipObjective(tiny_clip(), InfoNceObjective(temperature=FixedTemperature()))
    batch = make_batch(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image, text = encode_pair(objective.model, batch)
        loss = objective(batch)["loss"]
    assert (image.dtype, loss.dtype) == (torch.float32, torch.float32)
    logits = 100.0 * image @ text.T
    labels = torch.arange(6)
    expected = sum(torch.nn.functional.cross_entropy(rows, labels) for rows in (logits, logits.T)) / 2
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
