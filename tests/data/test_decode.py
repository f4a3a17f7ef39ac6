"""Decoding for training and evaluation: Pillow's decisions and pixels, whatever the mode and the decoder."""

from __future__ import annotations

import functools
import io
import logging
import random
import sys
import tracemalloc
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from sample_pictures import BAD_PICTURES, encode, image, png_header

from evatool.data.image.decode import decode_eval_image, decode_image, fast_jpeg_decoder, scale_for
from evatool.data.image.header import BadImage
from evatool.data.image.train_transforms import TrainTransform, crop_boxes
from evatool.data.prepare.drawings import Drawings
from evatool.data.train import shuffle
from evatool.recipe.schema import AugmentSection, DrawingsSource


def natural(height: int, width: int, seed: int = 0) -> Image.Image:
    """Noise enlarged: smooth as photographs are."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def jpeg(height: int = 120, width: int = 161, mode: str = "RGB", **options: object) -> bytes:
    return encode(natural(height, width).convert(mode), "JPEG", **{"quality": 85, **options})


def rotated_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    return exif


def mpo() -> bytes:
    return encode(natural(40, 60), "MPO", save_all=True, append_images=[natural(40, 60, 1)])


PICTURES = {
    **BAD_PICTURES,
    **{f"jpeg-{sub}": jpeg(subsampling=sub) for sub in ("4:4:4", "4:2:2", "4:2:0")},
    "jpeg-odd-sides": jpeg(77, 131),
    "jpeg-progressive": jpeg(progressive=True),
    "jpeg-grey": jpeg(mode="L"),
    "jpeg-cmyk": jpeg(mode="CMYK"),
    "jpeg-rgb": jpeg(keep_rgb=True),
    "jpeg-restarts": jpeg(restart_marker_rows=1),
    "jpeg-exif-orientation": jpeg(exif=rotated_exif()),
    "jpeg-without-end-mark": jpeg()[:-2],
    "jpeg-cut-late": jpeg()[:-40],
    "jpeg-tail": jpeg() + b"a tail that some cameras write",
    "jpeg-two-frames": mpo(),
    "png-named-jpg": image("PNG"),
    "webp-named-jpg": image("WEBP"),
    "bmp": image("BMP"),
    "palette-transparent": encode(natural(30, 40).convert("P"), "PNG", transparency=3),
    "grey-alpha": image("PNG", "LA"),
    "rgba": image("PNG", "RGBA"),
    "jpeg-start-only": b"\xff\xd8\xff\xe0" + bytes(40),
}
FUZZED = [name for name in PICTURES if name.startswith("jpeg")]


def reference(data: bytes) -> np.ndarray | None:
    """open_clip's reader: webdataset's "pilrgb" decoder; None where it skips the sample."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data))
            image.load()
            return np.asarray(image.convert("RGB"))
        except Exception:
            return None


def decoded(data: bytes, **options: object) -> np.ndarray | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return decode_image(data, **options)
        except BadImage:
            return None


def ends_early(data: bytes) -> bool:
    """True for a JPEG that Pillow fills up with grey: by libjpeg's own warning, which Pillow does not pass on."""
    try:
        simplejpeg.decode_jpeg(data)
    except ValueError as err:
        return "premature end" in str(err).lower()
    return False


@pytest.fixture(params=["simplejpeg", "pillow only"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    fast_jpeg_decoder.cache_clear()
    if request.param == "pillow only":
        monkeypatch.setitem(sys.modules, "simplejpeg", None)
    else:
        pytest.importorskip("simplejpeg")
    yield request.param
    fast_jpeg_decoder.cache_clear()


@pytest.mark.parity
@pytest.mark.parametrize("name", PICTURES)
def test_decisions_and_pixels_are_the_references(name: str, decoder: str) -> None:
    data = PICTURES[name]
    if name == "20000x20000":  # the reference would fill the memory
        for options in ({"mode": "fast"}, {"mode": "exact"}, {"mode": "scaled", "min_side": 20}):
            with pytest.raises(BadImage, match="too-large"):
                decode_image(data, **options)
        return
    expected = reference(data)
    for mode in ("exact", "fast"):
        found = decoded(data, mode=mode)
        assert (found is None) == (expected is None)
        if expected is not None:
            assert np.array_equal(found, expected)
    assert (decoded(data, mode="scaled", min_side=20) is None) == (expected is None)


@pytest.mark.parity
@pytest.mark.parametrize("name", FUZZED)
def test_damaged_jpegs_are_judged_as_the_reference_does(name: str, decoder: str) -> None:
    data, rng = PICTURES[name], random.Random(name)
    for trial in range(40):
        changed = bytearray(data)
        if trial % 2:
            del changed[rng.randrange(len(changed)) :]
        else:
            for _ in range(rng.randrange(1, 4)):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
        expected, found = reference(bytes(changed)), decoded(bytes(changed))
        if expected is not None and (expected.size > 10**7 or ends_early(bytes(changed))):
            continue
        assert (found is None) == (expected is None)
        if expected is not None:
            assert np.array_equal(found, expected)
        assert (decoded(bytes(changed), mode="scaled", min_side=20) is None) == (expected is None)


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("zero-byte", "zero-byte"),
        ("not-a-picture", "not-a-picture"),
        ("cut-jpeg", "truncated"),
        ("cut-png", "truncated"),
        ("cut-webp", "truncated"),
        ("20000x20000", "too-large"),
    ],
)
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_causes(name: str, cause: str, mode: str) -> None:
    with pytest.raises(BadImage) as caught:
        decode_image(PICTURES[name], mode=mode)
    assert caught.value.cause == cause


def test_formats_that_call_other_programs_are_refused() -> None:
    postscript = encode(natural(8, 8), "EPS")
    with pytest.raises(BadImage, match="unsupported-format: EPS"):
        decode_image(postscript)


def test_the_limit_is_judged_by_the_header(decoder: str) -> None:
    frame = jpeg().find(b"\xff\xc0")
    bomb = bytearray(jpeg())
    bomb[frame + 5 : frame + 9] = (60_000).to_bytes(2, "big") * 2
    tracemalloc.start()
    for data in (bytes(bomb), png_header(30_000, 30_000)):
        with pytest.raises(BadImage, match="too-large"):
            decode_image(data)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
    with pytest.raises(BadImage, match="limit 19319"):
        decode_image(jpeg(), max_pixels=120 * 161 - 1)


def test_missing_decoder_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    fast_jpeg_decoder.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            decode_image(jpeg())
    fast_jpeg_decoder.cache_clear()
    assert [r.message for r in caplog.records if "simplejpeg" in r.message] == [
        "simplejpeg is not installed: JPEGs are decoded by Pillow, slower; `pip install simplejpeg`"
    ]


def test_scale_keeps_the_pixels_needed() -> None:
    assert [scale_for(w, h, 100) for w, h in ((199, 900), (200, 200), (399, 400), (400, 4000))] == [1, 2, 2, 4]
    assert scale_for(4000, 4000, None) == 1


@pytest.mark.parametrize(("min_side", "scale"), [(61, 1), (60, 2), (31, 2), (30, 4)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_scaled_decode(min_side: int, scale: int, mode: str, decoder: str) -> None:
    """Sides are rounded up; both decoders give the same pixels, near the mean of each block."""
    data = jpeg(121, 162, mode)
    found = decode_image(data, mode="scaled", min_side=min_side)
    assert found.shape == (-(-121 // scale), -(-162 // scale), 3)
    image = Image.open(io.BytesIO(data))
    image.draft(image.mode, (162 // scale, 121 // scale))
    assert np.array_equal(found, np.asarray(image.convert("RGB")))
    whole = decode_image(data)[: 121 // scale * scale, : 162 // scale * scale].astype(float)
    blocks = whole.reshape(121 // scale, scale, 162 // scale, scale, 3).mean((1, 3))
    assert abs(blocks - found[: blocks.shape[0], : blocks.shape[1]]).mean() < 2.5


@pytest.mark.parity
@pytest.mark.parametrize("size", [56, 97])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize(
    "name", ["jpeg-4:2:0", "jpeg-odd-sides", "jpeg-cmyk", "rgba", "palette-transparent", "16-bit-grey", "animated-gif"]
)
def test_eval_pictures_are_open_clips(name: str, resize_mode: str, size: int) -> None:
    """Before `ToTensor`, on the RGB picture that both readers hand over."""
    from open_clip.transform import image_transform

    transform = image_transform(size, is_train=False, resize_mode=resize_mode)
    steps = [step for step in transform.transforms if type(step).__name__ in ("Resize", "CenterCrop")]
    expected = Image.fromarray(reference(PICTURES[name]))
    for step in steps:
        expected = step(expected)
    exact = decode_eval_image(PICTURES[name], size, resize_mode, "exact")
    assert exact.dtype == torch.uint8
    assert exact.shape == (3, size, size)
    assert exact.is_contiguous()
    assert np.array_equal(exact.permute(1, 2, 0).numpy(), np.asarray(expected))
    whole = transform(Image.fromarray(reference(PICTURES[name])))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (transform.transforms[-1].mean, transform.transforms[-1].std))
    torch.testing.assert_close((exact / 255 - mean) / std, whole)
    fast = decode_eval_image(PICTURES[name], size, resize_mode, "fast")
    assert (fast.int() - exact.int()).abs().max() <= 2


@pytest.mark.parity
@pytest.mark.parametrize("sides", [(56, 56), (56, 80), (80, 56), (57, 400)])
def test_eval_at_the_pictures_own_size(sides: tuple[int, int]) -> None:
    from open_clip.transform import image_transform

    data = encode(natural(*sides), "PNG")
    steps = image_transform(56, is_train=False).transforms[:2]
    expected = steps[1](steps[0](Image.fromarray(reference(data))))
    for decode in ("exact", "fast"):
        found = decode_eval_image(data, 56, "shortest", decode).permute(1, 2, 0).numpy().astype(int)
        assert abs(found - np.asarray(expected)).max() <= (0 if decode == "exact" else 2)


@pytest.mark.parity
def test_exact_training_crops_are_those_of_the_release() -> None:
    """EVA-CLIP's RandomResizedCrop(0.9, 1.0) on a Pillow picture, bicubic, given the same boxes."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as TF

    section = AugmentSection()
    files = [jpeg(90 + 7 * i, 200 - 11 * i) for i in range(8)]
    keys = shuffle.sample_keys(0, np.zeros(8, dtype=np.int64), np.arange(8))
    images = [torch.from_numpy(decode_image(f, mode="exact")).permute(2, 0, 1) for f in files]
    shapes = np.array([p.shape[1:] for p in images])
    boxes = crop_boxes(shapes, keys, section.crop_scale, section.crop_ratio).tolist()
    exact, small = TrainTransform(section, [64, 32], "exact")(images, keys)
    (fast,) = TrainTransform(section, [64], "fast")(images, keys)
    for i, (file, (top, left, height, width)) in enumerate(zip(files, boxes, strict=True)):
        image = Image.open(io.BytesIO(file)).convert("RGB")
        for found, size in ((exact, 64), (small, 32)):
            crop = TF.resized_crop(image, top, left, height, width, [size, size], InterpolationMode.BICUBIC)
            assert np.array_equal(found[i].permute(1, 2, 0).numpy(), np.asarray(crop))
    assert (fast.int() - exact.int()).abs().max() <= 2


def test_a_scaled_decode_leaves_enough_pixels_for_the_crop() -> None:
    section = AugmentSection()
    transform = TrainTransform(section, [64, 48], "scaled")
    assert transform.min_side == 68  # 64 / sqrt(0.9)
    assert TrainTransform(section, [64], "fast").min_side is None
    data = encode(natural(300, 400), "JPEG", quality=85)
    scaled = decode_image(data, mode="scaled", min_side=transform.min_side)
    assert scaled.shape == (75, 100, 3)
    keys = shuffle.sample_keys(0, np.zeros(1, dtype=np.int64), np.arange(1))
    found, _ = transform([torch.from_numpy(scaled).permute(2, 0, 1)], keys)
    ((top, left, height, width),) = crop_boxes(
        np.array([[75, 100]]), keys, section.crop_scale, section.crop_ratio
    ).tolist()
    crop = Image.open(io.BytesIO(data)).crop((4 * left, 4 * top, 4 * (left + width), 4 * (top + height)))
    expected = np.asarray(crop.resize((64, 64), Image.Resampling.BICUBIC)).astype(float)
    error = ((found[0].permute(1, 2, 0).numpy() - expected) ** 2).mean()
    assert 10 * np.log10(255**2 / error) > 33


@functools.cache
def drawn(artist: str) -> dict[str, bytes]:
    """PNG by concept of an icon set."""
    drawings = Drawings(DrawingsSource())
    pixels = {tile.concept.code: drawings.pixels(tile) for tile in drawings.tiles(drawings.seen, [artist])}
    return {code: encode(Image.fromarray(image), "PNG") for code, image in pixels.items()}


def enlarged(data: bytes, side: int) -> bytes:
    return encode(Image.open(io.BytesIO(data)).resize((side, side), Image.Resampling.BICUBIC), "JPEG", quality=80)


def unit_features(images: list[bytes], decode: str) -> torch.Tensor:
    """Pixels and horizontal and vertical edges of the pictures at 48 x 48, of unit length."""
    small = torch.stack([decode_eval_image(data, 48, decode=decode) for data in images]).double() - 128
    edges = [small.flatten(1), 2 * small.diff(dim=2).flatten(1), 2 * small.diff(dim=3).flatten(1)]
    return torch.nn.functional.normalize(torch.cat(edges, 1), dim=1)


@pytest.mark.parametrize("side", [None, 200])
def test_fast_decoding_changes_hardly_a_prediction(side: int | None) -> None:
    """By resemblance to another artist's drawings; with trained models: tests/benchmarks/data_eval_flips.py."""
    known, asked = drawn("noto"), drawn("twemoji")
    classes = sorted(known.keys() & asked.keys())
    assert len(classes) > 500
    weights = unit_features([known[code] for code in classes], "exact")
    images = [asked[code] if side is None else enlarged(asked[code], side) for code in classes]
    exact, fast = (unit_features(images, decode) for decode in ("exact", "fast"))
    assert not torch.equal(exact, fast)
    predicted = (exact @ weights.T).argmax(1)
    assert (predicted == torch.arange(len(classes))).float().mean() > 0.1
    assert (predicted != (fast @ weights.T).argmax(1)).float().mean() <= 0.001
