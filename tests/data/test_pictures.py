from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from sample_pictures import BAD_CAUSES, BAD_PICTURES, image, pixels, png_header

from evatool.data.image.decode import decode_rgb
from evatool.data.image.header import CAUSES, BadImage, encode_png, read_header


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_pictures_are_named(name: str) -> None:
    with pytest.raises(BadImage) as caught:
        decode_rgb(BAD_PICTURES[name])
    assert caught.value.cause == BAD_CAUSES[name]
    assert caught.value.cause in CAUSES
    assert caught.value.detail


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("PNG", mode) for mode in ("RGB", "RGBA", "LA", "L", "P", "1")),
        *(("JPEG", mode) for mode in ("RGB", "L")),
        *(("WEBP", mode) for mode in ("RGB", "RGBA")),
    ],
    ids=lambda value: value,
)
def test_plain_pictures_decode_as_pillow_does(kind: str, mode: str) -> None:
    data = image(kind, mode)
    header = read_header(data)
    decoded = decode_rgb(data)
    assert (decoded == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()
    assert decoded.shape == (header.height, header.width, 3)
    assert header.decoded_bytes == decoded.nbytes
    assert header.extension == {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}[kind]


def test_a_progressive_jpeg_is_fine() -> None:
    assert decode_rgb(image("JPEG", progressive=True)).shape == (24, 32, 3)


def test_size_is_judged_before_decoding() -> None:
    data = png_header(20_000, 20_000)
    tracemalloc.start()
    with pytest.raises(BadImage, match=r"20000 x 20000 pixels, limit 89478485"):
        decode_rgb(data)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_the_limit_is_ours_and_pillows_stays_as_it_was() -> None:
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(BadImage, match="limit 700"):
        read_header(image(), max_pixels=700)
    assert read_header(png_header(20_000, 20_000), max_pixels=400_000_000).width == 20_000
    assert before == Image.MAX_IMAGE_PIXELS


def test_png_encoding_is_lossless() -> None:
    assert (decode_rgb(encode_png(pixels(7, 9))) == pixels(7, 9)).all()
