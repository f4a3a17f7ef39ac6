"""Both tiled losses against dense float64 ones: value, every gradient, accuracies, at tile edges."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from dense_loss import dense_infonce, dense_sigmoid, dense_top1
from torch import Tensor

from evatool.model.features import l2_normalize
from evatool.objective.tiled import tiles
from evatool.objective.tiled.infonce import infonce_loss
from evatool.objective.tiled.sigmoid import sigmoid_loss

Losses = tuple[Callable[..., tuple[Tensor, dict[str, Tensor]]], Callable[..., Tensor]]
KINDS: dict[str, Losses] = {"infonce": (infonce_loss, dense_infonce), "sigmoid": (sigmoid_loss, dense_sigmoid)}
kinds = pytest.mark.parametrize("kind", KINDS)
captions = pytest.mark.parametrize("num_captions", [None, 9, 1], ids=["pair", "some equal", "all equal"])


def inputs(kind: str, size: int, width: int = 16, scale: float = 20.0) -> list[Tensor]:
    """Float64 unit features, scale and, for the sigmoid, bias; pictures lie near their captions."""
    generator = torch.Generator().manual_seed(size)
    text, noise = torch.randn(2, size, width, dtype=torch.float64, generator=generator)
    scalars = [torch.tensor(scale, dtype=torch.float64)]
    if kind == "sigmoid":
        scalars.append(torch.tensor(-8.0, dtype=torch.float64))
    return [l2_normalize(text + noise), l2_normalize(text), *scalars]


def ids(size: int, num_captions: int | None) -> Tensor | None:
    if num_captions is None:
        return None
    return torch.randint(0, num_captions, (size,), generator=torch.Generator().manual_seed(0))


def differentiate(loss: Callable[..., Tensor], values: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Loss and all gradients, in float64, at the same float32 point whatever the dtype."""
    values = [value.float().to(dtype).requires_grad_() for value in values]
    result = loss(*values)
    return [x.double().detach() for x in (result, *torch.autograd.grad(3 * result, values))]


@kinds
@captions
@pytest.mark.parametrize("side", [7, 15, 64], ids=lambda side: f"tiles of {side}")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)], ids=["f64", "f32"])
def test_loss_and_gradients_are_the_dense_ones(
    kind: str, num_captions: int | None, side: int, dtype: torch.dtype, tolerance: float, monkeypatch
) -> None:
    """float32, relative L2 norms; the scale's gradient is a difference of larger sums."""
    monkeypatch.setitem(tiles.TILE_SIDE, "cpu", side)
    ours, dense = KINDS[kind]
    caption_id, values = ids(30, num_captions), inputs(kind, 30)
    expected = differentiate(lambda *v: dense(*v, caption_id), values, torch.float64)
    found = differentiate(lambda *v: ours(*v, caption_id)[0], values, dtype)
    for name, a, b in zip(["loss", "image", "text", "scale", "bias"], found, expected, strict=False):
        assert float((a - b).norm()) <= tolerance * max(0.5 if name == "scale" else 1e-2, float(b.norm())), name


@kinds
@captions
def test_accuracies_count_the_first_of_the_best(kind: str, num_captions: int | None, monkeypatch) -> None:
    monkeypatch.setitem(tiles.TILE_SIDE, "cpu", 7)
    caption_id, (image, text, *scalars) = ids(40, num_captions), inputs(kind, 40)
    text[11], image[3] = text[30], image[2]  # ties across and within tiles
    _, logs = KINDS[kind][0](image, text, *scalars, caption_id)
    assert float(logs["i2t_top1"]) == pytest.approx(dense_top1(image @ text.T, caption_id))
    assert float(logs["t2i_top1"]) == pytest.approx(dense_top1(text @ image.T, caption_id))
    assert num_captions == 1 or 0 < float(logs["i2t_top1"]) < 1


@kinds
def test_gradients_are_numerically_right(kind: str, monkeypatch) -> None:
    monkeypatch.setitem(tiles.TILE_SIDE, "cpu", 2)
    caption_id, values = torch.tensor([0, 0, 1, 2, 2]), [v.requires_grad_() for v in inputs(kind, 5, 4, scale=3.0)]
    assert torch.autograd.gradcheck(lambda *v: KINDS[kind][0](*v, caption_id)[0], values)


def test_no_similarity_is_too_far_from_the_others(monkeypatch) -> None:
    """A row of all -100 beside rows with +100: exp would overflow or vanish without a row's own maximum."""
    monkeypatch.setitem(tiles.TILE_SIDE, "cpu", 2)
    text = torch.eye(4).repeat(1, 1)
    image = torch.stack([text[0], text[1], -text.sum(0) / 2, text[3]])
    loss, _ = infonce_loss(image, text, torch.tensor(100.0))
    expected = dense_infonce(image.double(), text.double(), torch.tensor(100.0).double())
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("caption_id", [None, torch.tensor([0, 0, 1, 1])], ids=["pair", "equal-captions"])
def test_infonce_starts_at_the_log_of_the_batch(caption_id: Tensor | None) -> None:
    """What the stuck-at-start warning relies on."""
    same = torch.ones(4, 1)
    assert float(infonce_loss(same, same, torch.tensor(10.0), caption_id)[0]) == pytest.approx(math.log(4), abs=1e-6)


@kinds
@pytest.mark.parametrize("side", [2, 64])
def test_a_bad_feature_makes_the_loss_bad(kind: str, side: int, monkeypatch) -> None:
    """What the guard against bad steps relies on; accuracies must not fail on the way."""
    monkeypatch.setitem(tiles.TILE_SIDE, "cpu", side)
    image, *rest = inputs(kind, 5)
    image[3, 1] = torch.nan
    for caption_id in (None, torch.tensor([0, 0, 1, 2, 2])):
        loss, logs = KINDS[kind][0](image, *rest, caption_id)
        assert math.isnan(float(loss))
        assert 0 <= float(logs["i2t_top1"]) <= 1


@pytest.mark.parity
@kinds
def test_losses_are_open_clips(kind: str) -> None:
    from open_clip.loss import ClipLoss, SigLipLoss

    theirs = {"infonce": ClipLoss(), "sigmoid": SigLipLoss()}[kind]
    values = inputs(kind, 7)
    expected = differentiate(theirs, values, torch.float64)
    found = differentiate(lambda *v: KINDS[kind][0](*v)[0], values, torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_equal_captions_infonce_is_the_loop_oracle() -> None:
    """Written out sample by sample: mean over positives of -log softmax, both directions."""
    image, text, scale = inputs("infonce", 6)
    caption_id = [0, 0, 1, 2, 2, 2]
    total = 0.0
    similarity = [[float(scale * image[i] @ text[j]) for j in range(6)] for i in range(6)]
    for table in (similarity, [list(column) for column in zip(*similarity, strict=True)]):
        for i in range(6):
            log_sum = math.log(sum(math.exp(s) for s in table[i]))
            same = [j for j in range(6) if caption_id[j] == caption_id[i]]
            total -= sum(table[i][j] - log_sum for j in same) / len(same)
    loss, _ = infonce_loss(image, text, scale, torch.tensor(caption_id))
    assert float(loss) == pytest.approx(total / 12, abs=1e-12)
