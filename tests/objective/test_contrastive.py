from __future__ import annotations

import math

import pytest
import torch
from tiny_clip import make_batch, tiny_clip
from torch import Tensor

from evatool.model.clip import build_clip
from evatool.model.presets import resolve_preset
from evatool.objective import contrastive
from evatool.objective.contrastive import ClipObjective, contrastive_loss, encode_text, pair_logits, positives, unit
from evatool.recipe.schema import InfoNceObjective
from evatool.types import Batch


def features(size: int, width: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit-length float64 image and text features with gradient."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(2, size, width, dtype=torch.float64, generator=generator)
    image, text = unit(raw)
    return image.clone().requires_grad_(), text.clone().requires_grad_()


def loop_oracle(image: Tensor, text: Tensor, scale: float, caption_id: list[int]) -> float:
    """The multi-positive loss written out sample by sample: mean over positives of -log softmax, both directions."""
    image, text, size, total = image.detach(), text.detach(), len(caption_id), 0.0
    similarity = [[scale * float(image[i] @ text[j]) for j in range(size)] for i in range(size)]
    for row in (similarity, [list(column) for column in zip(*similarity, strict=True)]):
        for i in range(size):
            log_sum = math.log(sum(math.exp(s) for s in row[i]))
            same = [j for j in range(size) if caption_id[j] == caption_id[i]]
            total -= sum(row[i][j] - log_sum for j in same) / len(same)
    return total / (2 * size)


def batch_with_ids(ids: list[int]) -> Batch:
    return Batch(image=torch.zeros(len(ids), 3, 1, 1), keys=[str(i) for i in ids], caption_id=torch.tensor(ids))


@pytest.mark.parity
def test_pair_loss_and_gradients_are_open_clips() -> None:
    from open_clip.loss import ClipLoss

    image, text = features(7)
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    ours = contrastive_loss(pair_logits(image, text, scale))
    theirs = ClipLoss()(image, text, scale)
    assert abs(float(ours.detach() - theirs.detach())) < 1e-12
    for a, b in zip(
        torch.autograd.grad(ours, (image, text, scale)),
        torch.autograd.grad(theirs, (image, text, scale)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "ids", [[0, 0, 1, 2, 2, 2], [5, 5, 5, 5], [0, 1, 2, 3]], ids=["some equal", "all equal", "all different"]
)
def test_equal_captions_loss_is_the_loop_oracle(ids: list[int]) -> None:
    image, text = features(len(ids))
    loss = contrastive_loss(pair_logits(image, text, 14.0), positives(batch_with_ids(ids), "equal-captions"))
    assert abs(float(loss.detach()) - loop_oracle(image, text, 14.0, ids)) < 1e-12


def test_equal_captions_gradient_is_numerically_right() -> None:
    image, text = features(5)
    is_positive = positives(batch_with_ids([0, 0, 1, 2, 2]), "equal-captions")
    assert torch.autograd.gradcheck(
        lambda i, t, s: contrastive_loss(pair_logits(i, t, s), is_positive),
        (image, text, torch.tensor(3.0, dtype=torch.float64, requires_grad=True)),
    )


def test_different_captions_make_both_kinds_the_same() -> None:
    image, text = features(4)
    logits = pair_logits(image, text, 14.0)
    same = contrastive_loss(logits, positives(batch_with_ids([7, 1, 9, 3]), "equal-captions"))
    torch.testing.assert_close(same, contrastive_loss(logits), rtol=0, atol=1e-12)


@pytest.mark.parametrize("ids", [None, [0, 0, 1, 1]], ids=["pair", "equal-captions"])
def test_loss_starts_at_the_log_of_the_batch(ids: list[int] | None) -> None:
    """What the stuck-at-start warning relies on."""
    logits = torch.zeros(4, 4), torch.zeros(4, 4)
    is_positive = None if ids is None else positives(batch_with_ids(ids), "equal-captions")
    assert float(contrastive_loss(logits, is_positive)) == pytest.approx(math.log(4), abs=1e-6)


@pytest.mark.parametrize("kind", ["pair", "equal-captions"])
def test_mean_over_ranks_is_the_global_loss(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row offsets and targets of each rank, with the collectives played by a loop (tests/dist runs the real ones)."""
    ids = [0, 1, 0, 2, 3, 1]
    image, text = features(6)
    expected = contrastive_loss(pair_logits(image, text, 14.0), positives(batch_with_ids(ids), kind))
    losses = []
    for rank in range(3):
        rows = slice(2 * rank, 2 * rank + 2)
        mine_image, mine_text = image[rows], text[rows]
        whole = {id(mine_image): image, id(mine_text): text}
        monkeypatch.setattr(contrastive, "all_gather_with_grad", lambda x, whole=whole: whole[id(x)])
        monkeypatch.setattr(contrastive, "all_gather_rows", lambda _: torch.tensor(ids))
        monkeypatch.setattr(contrastive, "rank", lambda rank=rank: rank)
        logits = pair_logits(mine_image, mine_text, 14.0)
        losses.append(contrastive_loss(logits, positives(batch_with_ids(ids[rows]), kind)))
    mean = sum(losses) / 3
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(mean, (image, text)), torch.autograd.grad(expected, (image, text)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


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


def test_accuracy_counts_every_equal_caption_as_right() -> None:
    logits = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    pair = contrastive.accuracies((logits, logits), None)
    equal = contrastive.accuracies((logits, logits), positives(batch_with_ids([4, 4, 5]), "equal-captions"))
    assert (float(pair["i2t_top1"]), float(equal["i2t_top1"])) == (pytest.approx(1 / 3), 1.0)


def test_temperature_has_bounds_under_its_parameters_name() -> None:
    objective = ClipObjective(tiny_clip(), InfoNceObjective())
    ((name, (low, high)),) = objective.parameter_bounds.items()
    assert name in dict(objective.named_parameters())
    assert (math.exp(low), math.exp(high)) == (1.0, pytest.approx(100.0))


def test_logits_stay_float32_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image, text = contrastive.encode_pair(tiny_clip(), make_batch(6))
        per_image, _ = pair_logits(image, text, 100.0)
    assert (image.dtype, per_image.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(per_image, 100.0 * image @ text.T)
