"""Encoded pictures for tests, good and bad."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image


def pixels(height: int = 24, width: int = 32, seed: int = 0) -> np.ndarray:
    """Random uint8 (H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def image(kind: str = "PNG", mode: str = "RGB", seed: int = 0, **options: object) -> bytes:
    return encode(Image.fromarray(pixels(seed=seed)).convert(mode), kind, **options)


def animated(kind: str) -> bytes:
    frames = [Image.fromarray(pixels(seed=seed)) for seed in range(3)]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:])


def png_header(width: int, height: int, bit_depth: int = 8) -> bytes:
    """A PNG whose header announces any size, with next to no data behind it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


BAD_PICTURES = {
    "zero-byte": b"",
    "not-a-picture": b"GIF? no, this is text",
    "cut-jpeg": image("JPEG")[:-200],
    "cut-png": image("PNG")[:-600],
    "cut-webp": image("WEBP", lossless=True)[:-300],
    "cut-header": image("PNG")[:20],
    "cmyk": image("JPEG", "CMYK"),
    "16-bit-grey": encode(Image.fromarray(pixels()[..., 0].astype(np.uint16) * 257), "PNG"),
    "16-bit-rgb": png_header(8, 8, bit_depth=16),
    "animated-gif": animated("GIF"),
    "animated-webp": animated("WEBP"),
    "animated-png": animated("PNG"),
    "20000x20000": png_header(20_000, 20_000),
    "gif": image("GIF", "P"),
    "tiff": image("TIFF"),
    "lab": encode(Image.fromarray(pixels()).convert("YCbCr"), "TIFF"),
}

BAD_CAUSES = {
    "zero-byte": "zero-byte",
    "not-a-picture": "not-a-picture",
    "cut-jpeg": "truncated",
    "cut-png": "truncated",
    "cut-webp": "truncated",
    "cut-header": "truncated",
    "cmyk": "cmyk",
    "16-bit-grey": "16-bit",
    "16-bit-rgb": "16-bit",
    "animated-gif": "animated",
    "animated-webp": "animated",
    "animated-png": "animated",
    "20000x20000": "too-large",
    "gif": "unsupported-format",
    "tiff": "unsupported-format",
    "lab": "unsupported-format",
}
