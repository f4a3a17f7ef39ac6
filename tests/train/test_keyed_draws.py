"""Dropout follows from the seed and the sample: not from its neighbours, micro-batches, ranks or the step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from evatool.core.batch import Batch
from evatool.model.clip import build_clip
from evatool.model.keyed_draws import KeyedDropPath, KeyedPatchDropoutWithIndices, StepDraws, splitmix, uniform
from evatool.model.presets import resolve_preset
from evatool.objective.build import build_objective
from evatool.recipe import schema
from evatool.train.state import TrainState

CPU = torch.device("cpu")
MASK = 2**64 - 1


def splitmix64(value: int) -> int:
    """The finalizer on plain integers."""
    value &= MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def test_mixing_is_splitmix64() -> None:
    values = [0, 1, 7, 2**31, 2**62 + 3, -1, -(2**63), 1234567890123]
    assert [value & MASK for value in splitmix(torch.tensor(values)).tolist()] == [
        splitmix64(value) for value in values
    ]


def test_draws_are_even_and_unrelated() -> None:
    draws = uniform(splitmix(torch.arange(200_000)))
    assert abs(float(draws.mean()) - 0.5) < 0.002
    assert abs(float(draws.var()) - 1 / 12) < 0.001
    assert abs(float(torch.corrcoef(torch.stack([draws[:-1], draws[1:]]))[0, 1])) < 0.01


def tower(preset: str = "EVA02-CLIP-debug") -> tuple[nn.Module, StepDraws]:
    torch.manual_seed(0)
    model = build_clip(resolve_preset(preset), patch_dropout=0.5, drop_path_rate=0.4).double().train()
    return model, StepDraws(model)


def features(model: nn.Module, draws: StepDraws, image: Tensor, samples: Tensor | None, seed: int = 3) -> Tensor:
    draws.start(samples, seed, CPU)
    found: Tensor = model.encode_image(image)  # type: ignore[operator]
    return found.detach()


def test_a_sample_is_the_same_in_any_batch() -> None:
    model, draws = tower()
    image, samples = torch.randn(12, 3, 32, 32, dtype=torch.float64), torch.arange(100, 112)
    whole = features(model, draws, image, samples)
    order = torch.tensor([7, 2, 11])
    assert torch.allclose(features(model, draws, image[order], samples[order]), whole[order], rtol=1e-12, atol=1e-14)
    assert not torch.allclose(features(model, draws, image, samples + 12), whole), "later samples, other draws"
    assert not torch.allclose(features(model, draws, image, samples, seed=4), whole), "another seed, other draws"


def test_shares_are_those_of_the_recipe() -> None:
    model, draws = tower()
    draws.start(torch.arange(20_000), 0, CPU)
    paths = [layer for layer in model.modules() if isinstance(layer, KeyedDropPath)]
    assert paths
    for layer in paths:
        assert layer.kept is not None
        assert float((layer.kept == 0).float().mean()) == pytest.approx(layer.drop_prob, abs=0.015)
        assert float(layer.kept.mean()) == pytest.approx(1.0, abs=0.03)
    (patches,) = [layer for layer in model.modules() if isinstance(layer, KeyedPatchDropoutWithIndices)]
    _, kept = patches(torch.randn(20_000, 17, 1))
    assert kept.shape == (20_000, 8)
    assert all(len(set(row)) == 8 for row in kept[:50].tolist())
    counts = torch.bincount(kept.flatten(), minlength=16) / 20_000
    assert torch.allclose(counts, torch.full((16,), 0.5), atol=0.02)


def test_without_samples_draws_are_torchs() -> None:
    """The rule of runs that were begun before: bit for bit timm's own layers."""
    model, draws = tower()
    torch.manual_seed(0)
    plain = build_clip(resolve_preset("EVA02-CLIP-debug"), patch_dropout=0.5, drop_path_rate=0.4).double().train()
    image = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    torch.manual_seed(9)
    expected = plain.encode_image(image)
    torch.manual_seed(9)
    assert torch.equal(features(model, draws, image, None), expected)


@pytest.mark.parametrize("preset", ["EVA02-CLIP-debug", "EVA02-CLIP-bigE-debug"])
def test_micro_batches_have_the_gradient_of_the_whole_batch(preset: str) -> None:
    from tests.train.test_micro_batches import eva_batch, gradients

    torch.manual_seed(0)
    model = build_clip(resolve_preset(preset), patch_dropout=0.5, drop_path_rate=0.3)
    objective = build_objective(schema.InfoNceObjective(), model).to(torch.float64)
    batch = eva_batch(16)
    batch.sample = torch.arange(32, 48)
    whole, parts = (gradients(objective, batch, micro, by_sample=True)[1] for micro in (16, 4))
    for name, grad in whole.items():
        assert torch.allclose(parts[name], grad, rtol=1e-9, atol=1e-12), name


def test_runs_without_the_key_keep_their_rule() -> None:
    saved = TrainState(draws_keyed_by="sample").to_json()
    assert TrainState.from_json(saved).draws_keyed_by == "sample"
    saved.pop("draws_keyed_by")
    assert TrainState.from_json(saved).draws_keyed_by == "rank"


def test_batches_carry_places_in_the_run(tmp_path: object) -> None:
    batch = Batch(image=torch.zeros(4, 3, 2, 2), keys=list("abcd"), sample=torch.arange(4))
    assert batch.rows(slice(1, 3)).sample.tolist() == [1, 2]  # type: ignore[union-attr]
