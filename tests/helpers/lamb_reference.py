"""LAMB in float64 on whole tensors, written from its formula alone, and parameters with recorded gradients to step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from evatool.core.batch import Batch, LossDict
from evatool.core.param_group import ParamGroup
from evatool.distributed.collectives import rank, world_size
from evatool.distributed.engines.build import build_engine
from evatool.distributed.engines.optimizer_state import LayerwiseOptimizer
from evatool.distributed.world import World
from evatool.optim.build import build_optimizer
from evatool.recipe.schema import EngineSection, GroupSection, LambSection

NUM_STEPS, BETAS, EPS = 50, (0.9, 0.98), 1e-6
SHAPES = {
    "a_weight": (16, 6),
    "a_bias": (17,),
    "b_weight": (8, 5),
    "b_norm": (8,),
    "scale": (1,),
    "c_weight": (3, 3, 3),
}
SIZES = {"a_weight": 5.0, "b_weight": 1e-4, "b_norm": 0.0}
"""Spread of first weights: large and tiny ones drive trust ratios to both bounds, and a ratio of nothing is 1."""


def recorded(step: int) -> dict[str, Tensor]:
    """The gradients of a step, float32."""
    generator = torch.Generator().manual_seed(1000 + step)
    return {
        name: torch.randn(shape, generator=generator) * 10 ** (-i) for i, (name, shape) in enumerate(SHAPES.items())
    }


def learning_rate(step: int) -> float:
    return 1e-2 * (1 - step / (2 * NUM_STEPS))


class Recorded(nn.Module):
    """A module whose gradients are the recorded ones: the loss is their product with the parameters."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            value = torch.randn(shape, generator=generator) * SIZES.get(name, 0.5)
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, batch: Batch) -> LossDict:
        grads = recorded(int(batch.position))
        return {"loss": sum((getattr(self, name) * g).sum() for name, g in grads.items())}


def grouped(module: nn.Module, has_layers: bool) -> list[ParamGroup]:
    """One group with decay, or two layers of which the second has none."""
    params = list(module.parameters())
    cut = [(0, 6, 1.0, 0.1)] if not has_layers else [(0, 3, 0.5, 0.1), (3, 6, 1.0, 0.0)]
    names = list(SHAPES)
    return [
        ParamGroup(f"layer{i}", "visual", i, 1.0, scale, decay, params[a:b], names[a:b])
        for i, (a, b, scale, decay) in enumerate(cut)
    ]


def section(**settings: object) -> LambSection:
    return LambSection(visual=GroupSection(lr=1.0), betas=BETAS, eps=EPS, **settings)


def step_all(kind: str, zero_stage: int, has_layers: bool, *, is_placed: bool = True, **settings: object) -> dict:
    """The parameters after all recorded steps on an engine."""
    module = Recorded()
    groups = grouped(module, has_layers)
    optimizer = build_optimizer(section(**settings), groups)
    assert isinstance(optimizer, LayerwiseOptimizer)
    if not is_placed:  # as a stock optimiser, which takes what it is given for layers
        optimizer.place({}, is_shared=False)
        optimizer.place = lambda *_, **__: None
    engine = build_engine(
        EngineSection(kind=kind, zero_stage=zero_stage),
        World(rank(), world_size(), rank(), torch.device("cpu")),
        module,
        groups,
        precision="fp32",
        grad_clip_norm=None,
        optimizer=optimizer,
        bounds={},
    )
    for step in range(NUM_STEPS):
        engine.set_lrs([learning_rate(step) * group.lr_scale for group in groups])
        engine.backward(engine.forward(Batch(torch.zeros(1), [""], position=step))["loss"])
        engine.step()
    state = engine.model_state()
    return {name: state[name].clone() for name in SHAPES}


def reference(has_layers: bool, virtual_world_size: int | None = None) -> dict[str, Tensor]:
    """DeepSpeed's formula in float64; ratios by tensor, or by slice of a group padded to 2 numbers a rank."""
    module = Recorded()
    groups = grouped(module, has_layers)
    result: dict[str, Tensor] = {}
    for group in groups:
        p = [param.detach().double().flatten() for param in group.params]
        m, v = [torch.zeros_like(x) for x in p], [torch.zeros_like(x) for x in p]
        for step in range(NUM_STEPS):
            grads = [recorded(step)[name].double().flatten() for name in group.param_names]
            lr = learning_rate(step) * group.lr_scale
            lr *= (1 - BETAS[1] ** (step + 1)) ** 0.5 / (1 - BETAS[0] ** (step + 1))
            m = [BETAS[0] * a + (1 - BETAS[0]) * g for a, g in zip(m, grads, strict=True)]
            v = [BETAS[1] * a + (1 - BETAS[1]) * g**2 for a, g in zip(v, grads, strict=True)]
            u = [a / (b.sqrt() + EPS) + group.weight_decay * x for a, b, x in zip(m, v, p, strict=True)]
            sizes = [len(x) for x in p]
            if virtual_world_size is None:
                p = [x - lr * trust(x, y) * y for x, y in zip(p, u, strict=True)]
                continue
            flat_p, flat_u, total = torch.cat(p), torch.cat(u), sum(sizes)
            each = -(-total // (2 * virtual_world_size)) * 2
            slices = zip(flat_p.split(each), flat_u.split(each), strict=True)
            p = list(torch.cat([x - lr * trust(x, y) * y for x, y in slices]).split(sizes))
        shapes = [SHAPES[name] for name in group.param_names]
        result |= {name: x.view(shape) for name, x, shape in zip(group.param_names, p, shapes, strict=True)}
    return result


def trust(p: Tensor, u: Tensor) -> float:
    weight, update = float(p.norm()), float(u.norm())
    return min(max(weight / update, 0.01), 10.0) if weight and update else 1.0


def worst(found: dict[str, Tensor], expected: dict[str, Tensor], names: Sequence[str] = tuple(SHAPES)) -> float:
    """The largest relative L2 error of a tensor."""
    return max(float((found[n].double() - expected[n]).norm() / expected[n].norm()) for n in names)
