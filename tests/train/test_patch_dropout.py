"""A tower that drops patches sees those that stay at their own places, picture by picture."""

from __future__ import annotations

import pytest
import torch

from evatool.model.clip import build_clip
from evatool.model.presets import resolve_preset
from evatool.stages.training.build import patch_dropouts

B = 5


def eva_kept(num_patches: int, share: float) -> int:
    """EVA-CLIP/rei/eva_clip/transformer.py, PatchDropout: the class token is not counted."""
    return max(1, int(num_patches * (1 - share)))


@pytest.mark.parametrize("preset", ["EVA02-CLIP-debug", "EVA01-CLIP-debug"])
def test_dropped_patches_are_as_if_nobody_looked_at_them(preset: str) -> None:
    """Against the whole picture with the dropped patches masked out of the attention: no rotary position is shifted."""
    torch.manual_seed(0)
    trunk = build_clip(resolve_preset(preset), patch_dropout=0.5).visual.trunk.double()
    kept: list[torch.Tensor] = []
    (dropout,) = patch_dropouts(trunk)
    dropout.register_forward_hook(lambda module, args, output: kept.append(output[1]))
    image = torch.randn(B, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        dropped = trunk.train()(image)
        (indices,) = kept
        is_seen = torch.zeros(B, 17, dtype=torch.bool)
        is_seen[:, 0] = True
        is_seen[torch.arange(B)[:, None], indices + 1] = True
        masked = trunk.eval()(image, attn_mask=is_seen[:, None, None, :])
        whole = trunk(image)
    assert indices.shape == (B, eva_kept(16, 0.5))
    assert len({tuple(sorted(row.tolist())) for row in indices}) > 1, "each picture drops its own"
    torch.testing.assert_close(dropped, masked, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(dropped, whole, rtol=1e-3)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.75, 0.9, 0.99])
def test_as_many_stay_as_in_eva(share: float) -> None:
    trunk = build_clip(resolve_preset("EVA02-CLIP-debug"), patch_dropout=share).visual.trunk.train()
    (dropout,) = patch_dropouts(trunk)
    for num_patches in (16, 49, 196, 256, 576):
        tokens, indices = dropout(torch.zeros(2, 1 + num_patches, 4))
        assert indices.shape[1] == tokens.shape[1] - 1 == eva_kept(num_patches, share)


def test_nothing_is_dropped_in_evaluation() -> None:
    trunk = build_clip(resolve_preset("EVA02-CLIP-debug"), patch_dropout=0.5).visual.trunk.eval()
    assert trunk.forward_features(torch.zeros(1, 3, 32, 32)).shape[1] == 17
