from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from evatool.data.image.train_transforms import TrainTransform, crop_boxes
from evatool.data.train import shuffle
from evatool.recipe.schema import AugmentSection

PLAIN = AugmentSection()  # EVA-CLIP's: RandomResizedCrop(0.9, 1.0), bicubic, and nothing else


def keys_of(n: int, seed: int = 0) -> np.ndarray:
    return shuffle.sample_keys(seed, np.zeros(n, dtype=np.int64), np.arange(n))


def smooth_picture(height: int, width: int, seed: int) -> Tensor:
    """A natural-looking picture: noise enlarged, so that resizing has something to keep."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (max(2, height // 6), max(2, width // 6), 3), dtype=np.uint8))
    pixels = np.array(small.resize((width, height), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1)


PICTURES = [
    smooth_picture(h, w, seed) for seed, (h, w) in enumerate([(64, 64), (48, 97), (130, 71), (33, 40), (5, 300)])
]
SHAPES = np.array([p.shape[-2:] for p in PICTURES])


@pytest.mark.parity
@pytest.mark.parametrize("size", [32, 48, 224])
def test_plain_crop_equals_torchvision(size: int) -> None:
    keys = keys_of(len(PICTURES))
    (out,) = TrainTransform(PLAIN, [size])(PICTURES, keys)
    boxes = crop_boxes(SHAPES, keys, PLAIN.crop_scale, PLAIN.crop_ratio)
    for cropped, image, (top, left, height, width) in zip(out, PICTURES, boxes.tolist(), strict=True):
        expected = TF.resized_crop(
            image, top, left, height, width, [size, size], InterpolationMode.BICUBIC, antialias=True
        )
        assert torch.equal(cropped, expected)
        # EVA's release works on Pillow pictures; the two differ by rounding (worst measured: 2).
        pillow = Image.fromarray(image.permute(1, 2, 0).numpy()).crop((left, top, left + width, top + height))
        resized = np.asarray(pillow.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
        difference = abs(resized - cropped.permute(1, 2, 0).numpy())
        assert difference.max() <= 2
        assert difference.mean() < 0.2


def looped_box(draws: list[float], height: int, width: int, section: AugmentSection) -> tuple[int, ...]:
    """torchvision's `RandomResizedCrop.get_params`, written out one try at a time."""
    low, high = (math.log(r) for r in section.crop_ratio)
    for t in range(10):
        area = height * width * (section.crop_scale[0] + (section.crop_scale[1] - section.crop_scale[0]) * draws[t])
        aspect = math.exp(low + (high - low) * draws[10 + t])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[20] * (height - h + 1)), int(draws[21] * (width - w + 1)), h, w
    aspect = width / height
    h, w = height, width
    if aspect < section.crop_ratio[0]:
        h = round(w / section.crop_ratio[0])
    elif aspect > section.crop_ratio[1]:
        w = round(h * section.crop_ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parity
@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.2, 1.0)], ids=["clip", "mim"])
def test_boxes_follow_torchvisions_loop(scale: tuple[float, float]) -> None:
    section = AugmentSection(crop_scale=scale)
    shapes = np.tile(SHAPES, (200, 1))
    keys = keys_of(len(shapes))
    draws = shuffle.uniforms(keys, shuffle.STREAM_CROP, 22)
    boxes = crop_boxes(shapes, keys, section.crop_scale, section.crop_ratio)
    for box, (height, width), row in zip(boxes.tolist(), shapes.tolist(), draws.tolist(), strict=True):
        assert tuple(box) == looped_box(row, height, width, section)


def test_views_share_one_crop() -> None:
    section = AugmentSection(horizontal_flip=0.5, rotate_degrees=15, color_jitter=0.4, grayscale=0.3)
    images = [smooth_picture(64, 64, seed) for seed in range(12)]
    small, large, same = TrainTransform(section, [24, 48, 24])(images, keys_of(12))
    assert small.shape == (12, 3, 24, 24)
    assert large.shape == (12, 3, 48, 48)
    assert same is small
    reduced = TF.resize(large, [24, 24], InterpolationMode.BICUBIC, antialias=True)
    assert (reduced.float() - small.float()).abs().mean() < 6
    assert (reduced.float() - small.roll(1, 0).float()).abs().mean() > 20  # another picture is far away


def test_transform_of_a_picture_does_not_depend_on_its_company() -> None:
    section = AugmentSection(horizontal_flip=0.5, rotate_degrees=15, color_jitter=0.4, grayscale=0.3)
    transform = TrainTransform(section, [32])
    images, keys = [smooth_picture(64, 64, seed) for seed in range(16)], keys_of(16)
    whole = transform(images, keys)[0]
    parts = [transform(images[i : i + 4], keys[i : i + 4])[0] for i in range(0, 16, 4)]
    assert torch.equal(whole, torch.cat(parts))


def test_flip_is_a_mirror_with_the_asked_share() -> None:
    images, keys = [PICTURES[0]] * 400, keys_of(400)
    plain = TrainTransform(PLAIN, [16])(images, keys)[0]
    flipped = TrainTransform(AugmentSection(horizontal_flip=0.25), [16])(images, keys)[0]
    mirrored = [bool(torch.equal(a, b.flip(-1))) for a, b in zip(flipped, plain, strict=True)]
    assert all(m or torch.equal(a, b) for m, a, b in zip(mirrored, flipped, plain, strict=True))
    assert 0.18 < np.mean(mirrored) < 0.32  # standard error 0.022


def test_rotation_is_bounded_and_fills_with_white() -> None:
    white = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    black = torch.zeros(3, 64, 64, dtype=torch.uint8)
    transform = TrainTransform(AugmentSection(rotate_degrees=30), [40])
    out = transform([white] * 20 + [black] * 20, keys_of(40))[0]
    assert (out[:20] == 255).all()
    assert (out[20:, :, 20, 20] == 0).all()
    assert (out[20:, :, 0, 0] == 255).float().mean() > 0.5  # a corner turned in from outside

    # The direction does not matter, the amount does: no more than torchvision's picture at 30 degrees turns away.
    corner = TF.rotate(torch.zeros(1, 3, 40, 40), 30, InterpolationMode.BILINEAR, fill=1.0)
    assert (out[20:] > 127).float().mean(dim=(1, 2, 3)).max() <= corner.mean() + 0.01


def test_rotation_by_nothing_changes_nothing() -> None:
    keys = keys_of(4)
    images = [smooth_picture(64, 64, seed) for seed in range(4)]
    plain = TrainTransform(PLAIN, [40])(images, keys)[0]
    turned = TrainTransform(AugmentSection(rotate_degrees=1e-4), [40])(images, keys)[0]
    assert (plain.int() - turned.int()).abs().max() <= 1


def test_grayscale_is_pillows_luma() -> None:
    keys = keys_of(8)
    images = [smooth_picture(64, 64, seed) for seed in range(8)]
    plain = TrainTransform(PLAIN, [40])(images, keys)[0]
    gray = TrainTransform(AugmentSection(grayscale=1.0), [40])(images, keys)[0]
    for image, source in zip(gray, plain, strict=True):
        expected = np.asarray(Image.fromarray(source.permute(1, 2, 0).numpy()).convert("L")).astype(int)
        assert (image[0] == image[1]).all()
        assert (image[1] == image[2]).all()
        assert abs(image[0].numpy() - expected).max() <= 1


def test_grayscale_leaves_the_others_alone() -> None:
    images, keys = [PICTURES[0]] * 200, keys_of(200)
    plain = TrainTransform(PLAIN, [16])(images, keys)[0]
    some = TrainTransform(AugmentSection(grayscale=0.3), [16])(images, keys)[0]
    unchanged = (plain == some).flatten(1).all(1)
    assert 0.6 < unchanged.float().mean() < 0.8


@pytest.mark.parametrize(
    ("draw", "operation"),
    [
        ((0.5, 0, 0), lambda x: TF.adjust_brightness(x, 1.2)),
        ((0, 0.5, 0), lambda x: TF.adjust_contrast(x, 1.2)),
        ((0, 0, -0.5), lambda x: TF.adjust_saturation(x, 0.8)),
    ],
    ids=["brightness", "contrast", "saturation"],
)
def test_colour_changes_are_torchvisions(draw, operation, monkeypatch: pytest.MonkeyPatch) -> None:
    # One change at a time on a picture far from black and white, where nothing is clipped between the steps.
    image = (smooth_picture(40, 40, 3).float() * 0.4 + 70).to(torch.uint8)
    fixed = np.array([[*((d + 1) / 2 for d in draw), 0.5]])
    uniforms = shuffle.uniforms
    monkeypatch.setattr(shuffle, "uniforms", lambda k, s, n: fixed if s == shuffle.STREAM_COLOR else uniforms(k, s, n))
    section = AugmentSection(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), color_jitter=0.4)
    (out,) = TrainTransform(section, [40])([image], keys_of(1))
    assert (out[0].int() - operation(image).int()).abs().max() <= 1


def test_hue_turns_and_keeps_grey(monkeypatch: pytest.MonkeyPatch) -> None:
    turned = np.array([[0.5, 0.5, 0.5, 1.0]] * 2)
    uniforms = shuffle.uniforms
    monkeypatch.setattr(shuffle, "uniforms", lambda k, s, n: turned if s == shuffle.STREAM_COLOR else uniforms(k, s, n))
    red = torch.zeros(3, 8, 8, dtype=torch.uint8)
    red[0] = 120
    grey = torch.full((3, 8, 8), 120, dtype=torch.uint8)
    section = AugmentSection(color_jitter=1.0)  # a quarter turn
    red_out, grey_out = TrainTransform(section, [8])([red, grey], np.repeat(keys_of(1), 2))[0]
    assert torch.equal(grey_out, grey)
    assert red_out[:, 4, 4].argmax() != 0
    assert red_out[:, 4, 4].float().std() > 20
