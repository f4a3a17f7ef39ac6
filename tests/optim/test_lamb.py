from __future__ import annotations

import pytest
import torch
from lamb_reference import EPS, Recorded, grouped, recorded, reference, section, step_all, worst

from evatool.core.errors import RecipeError
from evatool.optim.build import build_optimizer
from evatool.optim.lamb import Lamb
from evatool.recipe.load import resolve_table

layers = pytest.mark.parametrize("has_layers", [False, True], ids=["one group", "layer decay"])


@layers
def test_every_tensor_is_the_float64_references(has_layers: bool) -> None:
    """Relative L2 per tensor after 50 steps."""
    assert worst(step_all("single", 0, has_layers), reference(has_layers)) <= 1e-6


@layers
@pytest.mark.parametrize("virtual_world_size", [1, 2, 3, 8, 200])
def test_flat_shards_are_slices_of_the_padded_group(has_layers: bool, virtual_world_size: int) -> None:
    sliced = {"granularity": "flat-shard", "virtual_world_size": virtual_world_size}
    assert worst(step_all("single", 0, has_layers, **sliced), reference(has_layers, virtual_world_size)) <= 1e-6


@pytest.mark.parity
@layers
@pytest.mark.parametrize("clip", [None, 1.0])
def test_the_timm_variant_is_timms(has_layers: bool, clip: float | None) -> None:
    from timm.optim import Lamb as TimmLamb

    ours, theirs = Recorded().double(), Recorded().double()
    groups = grouped(ours, has_layers)
    mine = build_optimizer(section(variant="timm"), groups)
    settings = [{"params": g.params, "weight_decay": g.weight_decay} for g in grouped(theirs, has_layers)]
    reference = TimmLamb(settings, betas=(0.9, 0.98), eps=EPS, max_grad_norm=clip)
    for step in range(10):
        for module in (ours, theirs):
            for param, grad in zip(module.parameters(), recorded(step).values(), strict=True):
                param.grad = grad.double()
        norm = torch.nn.utils.get_total_norm([p.grad for p in ours.parameters()])
        mine.grad_scale = None if clip is None else (norm / clip).clamp(min=1.0)  # as the engines do
        for group in (*mine.param_groups, *reference.param_groups):
            group["lr"] = 0.01 * (step + 1)
        mine.step()
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def one_step(**attributes: torch.Tensor) -> tuple[Recorded, torch.optim.Optimizer]:
    module = Recorded()
    optimizer = build_optimizer(section(), grouped(module, False))
    for param, grad in zip(module.parameters(), recorded(0).values(), strict=True):
        param.grad = grad.clone()
    for name, value in attributes.items():
        setattr(optimizer, name, value)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    return module, optimizer


def test_nothing_changes_where_a_gradient_is_bad() -> None:
    module, optimizer = one_step(found_inf=torch.tensor(1.0))
    assert not optimizer.state
    for param, start in zip(module.parameters(), Recorded().parameters(), strict=True):
        assert torch.equal(param, start)
    module, optimizer = one_step(found_inf=torch.tensor(0.0))
    assert len(optimizer.state) == len(list(module.parameters()))


def test_gradients_are_divided_by_their_scale() -> None:
    module, optimizer = one_step(grad_scale=torch.tensor(4.0))
    for param, grad in zip(module.parameters(), recorded(0).values(), strict=True):
        torch.testing.assert_close(optimizer.state[param]["exp_avg"], 0.1 * grad / 4)


def test_a_step_at_learning_rate_0_changes_no_weight() -> None:
    """What DeepSpeed does while it sets up."""
    module = Recorded()
    optimizer = build_optimizer(section(), grouped(module, False))
    for param in module.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for param, start in zip(module.parameters(), Recorded().parameters(), strict=True):
        assert torch.equal(param, start)


def test_a_recipe_chooses_the_optimiser() -> None:
    table = {
        "data": {"train": "x"},
        "model": {"preset": "EVA02-CLIP-toy"},
        "optim": {"kind": "lamb", "visual": {"lr": 1e-3}, "text": {"lr": 1e-3}},
        "train": {"samples_seen": 100, "global_batch_size": 10},
    }
    groups = grouped(Recorded(), False)
    assert isinstance(build_optimizer(resolve_table(table, "train-clip").recipe.optim, groups), Lamb)
    table["optim"]["kind"] = "adamw"
    assert isinstance(build_optimizer(resolve_table(table, "train-clip").recipe.optim, groups), torch.optim.AdamW)
    del table["optim"]["kind"]
    assert resolve_table(table, "train-clip").recipe.optim.kind == "adamw"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"granularity": "flat-shard"}, "needs virtual_world_size"),
        ({"virtual_world_size": 8}, "virtual_world_size has no effect"),
        ({"kind": "adamw", "variant": "timm"}, 'it needs optim.kind = "lamb"'),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, object], message: str) -> None:
    table = {
        "data": {"train": "x"},
        "model": {"preset": "EVA02-CLIP-toy"},
        "optim": {"kind": "lamb", "visual": {"lr": 1e-3}, "text": {"lr": 1e-3}, **settings},
        "train": {"samples_seen": 100, "global_batch_size": 10},
    }
    with pytest.raises(RecipeError, match=message):
        resolve_table(table, "train-clip")
