"""Distillation's tiled losses against dense float64 ones: value and every gradient, at tile edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from dense_distill import (
    dense_interactive,
    dense_relation,
    dense_sigmoid_divergence,
    dense_softmax_divergence,
)
from torch import Tensor

from evatool.model.features import l2_normalize
from evatool.objective.tiled import tiles
from evatool.objective.tiled.divergence import sigmoid_divergence, softmax_divergence
from evatool.objective.tiled.relation import interactive_loss, relation_loss

SIZE = 30
T_SCALE, T_BIAS = 14.0, -4.0


def student(size: int = SIZE, width: int = 16, scale: float = 10.0) -> list[Tensor]:
    """Float64 image and text features, scale and bias; pictures lie near their captions."""
    generator = torch.Generator().manual_seed(size)
    text, noise = torch.randn(2, size, width, dtype=torch.float64, generator=generator)
    scalars = [torch.tensor(value, dtype=torch.float64) for value in (scale, -6.0)]
    return [l2_normalize(text + noise), l2_normalize(text), *scalars]


@cache
def teacher(size: int = SIZE, width: int = 24) -> tuple[Tensor, Tensor]:
    """At a width of its own."""
    image, text, *_ = student(size, width)
    generator = torch.Generator().manual_seed(size + 1)
    mixing = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator)).Q
    return l2_normalize(image @ mixing), l2_normalize(text @ mixing + 0.3 * image)


def known(like: Tensor, width: int = 24) -> tuple[Tensor, Tensor]:
    """The teacher at the same float32 point whatever the dtype."""
    image, text = (x.float().to(like.dtype) for x in teacher(len(like), width))
    return image, text


def repeated(size: int) -> Tensor:
    return torch.randint(0, 9, (size,), generator=torch.Generator().manual_seed(0))


Ours = Callable[..., Tensor]

# name: loss of (image, text, scale, bias), tiled and dense
KINDS: dict[str, Callable[[dict[str, Ours]], Ours]] = {
    "softmax": lambda f: lambda i, t, s, b: f["softmax"]((i, t), s, known(i), T_SCALE),
    "softmax at T = 3": lambda f: lambda i, t, s, b: f["softmax"]((i, t), s, known(i), T_SCALE, 3.0),
    "sigmoid": lambda f: lambda i, t, s, b: f["sigmoid"]((i, t), s, b, known(i), T_SCALE, T_BIAS),
    "sigmoid at T = 3": lambda f: lambda i, t, s, b: f["sigmoid"]((i, t), s, b, known(i), T_SCALE, T_BIAS, 3.0),
    "relation": lambda f: lambda i, t, s, b: f["relation"]((i, t), known(i)),
    "interactive": lambda f: lambda i, t, s, b: f["interactive"]((i, t), known(i, i.shape[1]), s),
    "interactive, equal captions": lambda f: (
        lambda i, t, s, b: f["interactive"]((i, t), known(i, i.shape[1]), s, repeated(len(i)))
    ),
    "interactive sigmoid": lambda f: (
        lambda i, t, s, b: f["interactive"]((i, t), known(i, i.shape[1]), s, repeated(len(i)), b)
    ),
}
TILED: dict[str, Ours] = {
    "softmax": softmax_divergence,
    "sigmoid": sigmoid_divergence,
    "relation": relation_loss,
    "interactive": interactive_loss,
}
DENSE: dict[str, Ours] = {
    "softmax": dense_softmax_divergence,
    "sigmoid": dense_sigmoid_divergence,
    "relation": dense_relation,
    "interactive": dense_interactive,
}


def differentiate(loss: Ours, values: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Loss and all gradients, in float64, at the same float32 point whatever the dtype."""
    values = [value.float().to(dtype).requires_grad_() for value in values]
    result = loss(*values)
    grads = torch.autograd.grad(3 * result, values, allow_unused=True, materialize_grads=True)
    return [x.double().detach() for x in (result, *grads)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [7, 15, 64], ids=lambda side: f"tiles of {side}")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)], ids=["f64", "f32"])
def test_loss_and_gradients_are_the_dense_ones(
    kind: str, side: int, dtype: torch.dtype, tolerance: float, monkeypatch
) -> None:
    """In relative L2 norms; the gradients of scale and bias are differences of larger sums."""
    monkeypatch.setitem(tiles.TILE_SIDE, "cpu", side)
    expected = differentiate(KINDS[kind](DENSE), student(), torch.float64)
    found = differentiate(KINDS[kind](TILED), student(), dtype)
    for name, a, b in zip(["loss", "image", "text", "scale", "bias"], found, expected, strict=True):
        assert float((a - b).norm()) <= tolerance * max(0.5 if name in ("scale", "bias") else 1e-2, float(b.norm())), (
            name
        )


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_numerically_right(kind: str, monkeypatch) -> None:
    monkeypatch.setitem(tiles.TILE_SIDE, "cpu", 2)
    values = [value.requires_grad_() for value in student(5, 4, scale=3.0)]
    assert torch.autograd.gradcheck(KINDS[kind](TILED), values)


@pytest.mark.parametrize("kind", KINDS)
def test_no_matrix_of_all_pairs_is_held(kind: str, monkeypatch) -> None:
    """The largest tensor of forward and backward is a tile, or the features."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, list | tuple) else [out]:
                if isinstance(x, Tensor):
                    Largest.numel = max(Largest.numel, x.numel())
            return out

    monkeypatch.setitem(tiles.TILE_SIDE, "cpu", 16)
    values = [value.requires_grad_() for value in student(256)]
    loss = KINDS[kind](TILED)
    known(values[0]), known(values[0], 16)  # made before
    with Largest():
        loss(*values).backward()
    assert Largest.numel <= 24 * 256 < 256 * 256


def test_divergences_are_zero_at_the_teachers_own_answers() -> None:
    image, text, scale, bias = student()
    assert float(softmax_divergence((image, text), scale, (image, text), float(scale))) == pytest.approx(0, abs=1e-12)
    own = sigmoid_divergence((image, text), scale, bias, (image, text), float(scale), float(bias))
    assert float(own) == pytest.approx(0, abs=1e-12)
    assert float(relation_loss((image, text), (image, text))) == 0
    turned = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q
    assert float(relation_loss((image @ turned, text @ turned), (image, text))) == pytest.approx(0, abs=1e-12)


def test_no_similarity_is_too_far_from_the_others(monkeypatch) -> None:
    """Rows of -100 beside rows with +100: exp would overflow or vanish without a row's own maximum."""
    monkeypatch.setitem(tiles.TILE_SIDE, "cpu", 2)
    text = torch.eye(4)
    image = torch.stack([text[0], text[1], -text.sum(0) / 2, text[3]])
    mine, other = (image.double(), text.double()), (text.double(), image.double())
    scale = torch.tensor(100.0).double()
    for loss, dense, extra in (
        (softmax_divergence, dense_softmax_divergence, (other, 100.0)),
        (sigmoid_divergence, dense_sigmoid_divergence, (torch.tensor(-10.0).double(), other, 100.0, -10.0)),
    ):
        found = loss(mine, scale, *extra)
        assert float(found) == pytest.approx(float(dense(mine, scale, *extra)), rel=1e-10)
        assert math.isfinite(float(found))


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_feature_makes_the_loss_bad(kind: str) -> None:
    """What the guard against bad steps relies on."""
    image, *rest = student(5)
    image[3, 1] = torch.nan
    assert math.isnan(float(KINDS[kind](TILED)(image, *rest)))
