"""EVA-L's masked autoencoder against the same model written out in sums and products, and its recipe's refusals."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from evatool.core.errors import RecipeError
from evatool.data.train.masking import MaskSpec
from evatool.model.mae import MaeModel, sincos_positions
from evatool.model.mim import build_mim
from evatool.model.presets import resolve_preset
from evatool.objective.mim import masked_feature_loss
from evatool.recipe.load import resolve_table
from evatool.runs.run_dir import RunOptions
from evatool.stages import run_stage

CONFIG = resolve_preset("EVA-L-debug")
W = dict[str, Tensor]


def norm(x: Tensor, w: W, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def block(x: Tensor, w: W, name: str, heads: int) -> Tensor:
    """A pre-norm transformer block, one picture (tokens, width)."""
    h = norm(x, w, f"{name}.norm1")
    qkv = h @ w[f"{name}.attn.qkv.weight"].T + w[f"{name}.attn.qkv.bias"]
    q, k, v = qkv.chunk(3, dim=-1)
    size = q.shape[-1] // heads
    parts = []
    for i in range(heads):
        mine = slice(i * size, (i + 1) * size)
        weights = torch.softmax(q[:, mine] @ k[:, mine].T / math.sqrt(size), dim=-1)
        parts.append(weights @ v[:, mine])
    x = x + torch.cat(parts, -1) @ w[f"{name}.attn.proj.weight"].T + w[f"{name}.attn.proj.bias"]
    h = norm(x, w, f"{name}.norm2") @ w[f"{name}.mlp.fc1.weight"].T + w[f"{name}.mlp.fc1.bias"]
    h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    return x + h @ w[f"{name}.mlp.fc2.weight"].T + w[f"{name}.mlp.fc2.bias"]


def autoencoder(w: W, image: Tensor, mask: Tensor) -> Tensor:
    """MAE's own way: keep the visible patches, decode all of them in their order; one picture."""
    size, side = CONFIG.patch_size, CONFIG.grid[0]
    places = [
        (slice(r * size, (r + 1) * size), slice(c * size, (c + 1) * size)) for r in range(side) for c in range(side)
    ]
    patches = [image[:, rows, columns].flatten() for rows, columns in places]
    kernel = w["visual.patch_embed.proj.weight"].flatten(1)
    embedded = torch.stack(patches) @ kernel.T + w["visual.patch_embed.proj.bias"]
    table = sincos_positions(CONFIG.grid, CONFIG.width)[0].to(image.dtype)
    visible = [i for i in range(len(patches)) if not mask[i]]
    x = torch.cat([w["visual.cls_token"][0] + table[:1], embedded[visible] + table[1:][visible]])
    for i in range(CONFIG.depth):
        x = block(x, w, f"visual.blocks.{i}", CONFIG.num_heads)
    x = norm(x, w, "visual.norm") @ w["decoder_embed.weight"].T + w["decoder_embed.bias"]
    decoder = CONFIG.decoder
    rows = [x[1 + visible.index(i)] if i in visible else w["mask_token"][0, 0] for i in range(len(patches))]
    y = torch.cat([x[:1], torch.stack(rows)]) + sincos_positions(CONFIG.grid, decoder["width"])[0].to(image.dtype)
    for i in range(decoder["layers"]):
        y = block(y, w, f"decoder_blocks.{i}", decoder["heads"])
    y = norm(y, w, "decoder_norm")[1:]
    return y[mask] @ w["lm_head.weight"].T + w["lm_head.bias"]


@pytest.mark.parity
def test_prediction_and_gradients_are_mae_s() -> None:
    torch.manual_seed(5)
    model = build_mim(CONFIG, predict_dim=32).double()
    assert isinstance(model, MaeModel)
    with torch.no_grad():
        for param in model.parameters():  # norms and biases too
            param.add_(0.1 * torch.randn_like(param))
    generator = MaskSpec(CONFIG.grid, 0.75, 0.0625, "random").generator()
    mask = torch.stack([torch.from_numpy(generator(random.Random(i))) for i in range(3)])
    image = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    target = torch.randn(int(mask.sum()), 32, dtype=torch.float64)
    prediction = model(image, mask)
    loss = masked_feature_loss(prediction, target)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    weights = dict(model.named_parameters())
    by_hand = torch.cat([autoencoder(weights, *pair) for pair in zip(image, mask, strict=True)])
    # The sign of its log: negative, and falling as predictions turn towards the targets.
    cosine = (by_hand * target).sum(-1) / (by_hand.norm(dim=-1) * target.norm(dim=-1))
    theirs = torch.autograd.grad(-cosine.mean(), list(model.parameters()))
    torch.testing.assert_close(prediction, by_hand, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(loss, -cosine.mean(), rtol=1e-10, atol=1e-10)
    for (name, _), a, b in zip(model.named_parameters(), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=name)


def test_what_a_masked_autoencoder_cannot_follow_is_refused(tmp_path: Path) -> None:
    table = {
        "data": {"train": "shards"},
        "model": {"preset": "EVA-L-debug"},
        "teacher": {"model": "EVA02-CLIP-debug"},
        "optim": {"visual": {"lr": 1e-3}, "grad_clip_norm": 1.0},
        "train": {"samples_seen": 8, "global_batch_size": 8},
    }
    with pytest.raises(RecipeError) as error:
        run_stage(resolve_table(table, "pretrain-mim"), RunOptions(name="mim", run_dir=tmp_path / "run"))
    assert "objective.masking" in error.value.problems[0]
    assert "patch_embed_grad_scale" in error.value.problems[1]
    objective = {"objective": {"kind": "mim", "masking": "random", "min_block_fraction": 0.1}}
    with pytest.raises(RecipeError, match="min_block_fraction"):
        resolve_table(table | objective, "pretrain-mim")
