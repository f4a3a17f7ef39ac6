"""timm models as teachers: the features timm itself gives, on any grid."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from evatool.core.errors import CheckpointError, RecipeError
from evatool.teachers.timm import load_timm_teacher, resize_grid


def images(size: int, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def saved(path: Path, name: str, rename: str = "") -> tuple[torch.nn.Module, Path]:
    torch.manual_seed(1)
    model = timm.create_model(name).eval()
    for part in model.modules():  # so that running statistics and weights of norms matter
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(part.running_var, 0.5, 2)
    state = {f"{rename}{key}": tensor.clone() for key, tensor in model.state_dict().items()}
    if rename:
        torch.save(state, path / "weights.pth")  # keeps the order, which is all that is left
        return model, path / "weights.pth"
    save_file(state, path / "weights.safetensors")
    return model, path / "weights.safetensors"


def by_hand(model: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
    """Normalised as timm's own configuration of the model says."""
    config = timm.data.resolve_data_config(model.pretrained_cfg)
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (image.float() / 255 - mean) / std


def test_a_transformers_patches_after_its_norm(tmp_path: Path) -> None:
    model, path = saved(tmp_path, "test_vit")
    teacher = load_timm_teacher("test_vit", weights=path)
    image = images(teacher.image_size)
    with torch.no_grad():
        tokens = model.forward_features(by_hand(model, image))[:, model.num_prefix_tokens :]
    assert teacher.visual_tokens(image).dtype == torch.float32
    torch.testing.assert_close(teacher.visual_tokens(image), tokens, rtol=1e-5, atol=1e-5)
    assert (teacher.grid, teacher.embed_dim) == ((10, 10), 64)
    assert teacher.grid[0] * teacher.grid[1] == tokens.shape[1]


@pytest.mark.parametrize("rename", ["", "their_"], ids=["by name", "in order"])
def test_a_convolutional_networks_stage(tmp_path: Path, rename: str) -> None:
    model, path = saved(tmp_path, "test_efficientnet", rename)
    image = images(96)
    with torch.no_grad():
        every = model.forward_intermediates(by_hand(model, image), intermediates_only=True)
    for layer in (1, -1):
        teacher = load_timm_teacher("test_efficientnet", weights=path, layer=layer, image_size=96)
        tokens = teacher.visual_tokens(image)
        assert teacher.grid == tuple(every[layer].shape[-2:])
        torch.testing.assert_close(tokens, every[layer].flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not teacher.model.training


def test_its_own_pixel_statistics_are_used() -> None:
    assert load_timm_teacher("tf_efficientnet_lite0", layer=3, image_size=64).mean == (0.5, 0.5, 0.5)
    assert load_timm_teacher("test_efficientnet", image_size=64).mean != (0.5, 0.5, 0.5)


def test_a_fingerprint_is_the_teachers(tmp_path: Path) -> None:
    _, path = saved(tmp_path, "test_efficientnet")
    one, two = (load_timm_teacher("test_efficientnet", weights=path).fingerprint for _ in range(2))
    assert one == two
    assert load_timm_teacher("test_efficientnet", weights=path, layer=1).fingerprint != one
    assert load_timm_teacher("test_efficientnet").fingerprint != one


def test_a_transformer_of_another_input_size(tmp_path: Path) -> None:
    _, path = saved(tmp_path, "test_vit")
    teacher = load_timm_teacher("test_vit", weights=path, image_size=64)
    assert teacher.grid == (4, 4)
    assert teacher.visual_tokens(images(64)).shape == (2, 16, 64)


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    _, path = saved(tmp_path, "test_vit")
    with pytest.raises(CheckpointError, match="tensors for"):
        load_timm_teacher("test_efficientnet", weights=path)
    with pytest.raises(RecipeError, match="no model 'vit_tinny_patch16_224'"):
        load_timm_teacher("vit_tinny_patch16_224")
    with pytest.raises(RecipeError, match="no features of layer 99"):
        load_timm_teacher("test_efficientnet", layer=99)


@pytest.mark.parametrize("wanted", [(4, 4), (3, 5), (8, 8), (2, 2)])
def test_grids_cover_the_same_picture(wanted: tuple[int, int]) -> None:
    """A feature that is linear in the place, away from the border, stays so; and a mean stays the mean."""
    rows, columns = torch.meshgrid((torch.arange(6) + 0.5) / 6, (torch.arange(6) + 0.5) / 6, indexing="ij")
    tokens = torch.stack([rows, columns, torch.ones(6, 6)], dim=-1).reshape(1, 36, 3)
    found = resize_grid(tokens, (6, 6), wanted).reshape(*wanted, 3)
    places = [(torch.arange(n) + 0.5) / n for n in wanted]
    inside = [(p > 0.3) & (p < 0.7) for p in places]
    torch.testing.assert_close(found[:, 0, 0][inside[0]], places[0][inside[0]], rtol=0, atol=0.01)
    torch.testing.assert_close(found[0, :, 1][inside[1]], places[1][inside[1]], rtol=0, atol=0.01)
    torch.testing.assert_close(found[..., 2], torch.ones(wanted), rtol=0, atol=1e-6)
    assert float(found[..., 0].mean()) == pytest.approx(0.5, abs=1e-6)
    assert resize_grid(tokens, (6, 6), (6, 6)) is tokens
    expected = F.interpolate(tokens.mT.reshape(1, 3, 6, 6), wanted, mode="bilinear", antialias=True)
    torch.testing.assert_close(found, expected[0].permute(1, 2, 0))
