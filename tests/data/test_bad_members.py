"""Rows R19 and R20 of docs/faults.md: odd members are used, converted or replaced, each by a stated rule."""

from __future__ import annotations

import io
import pickle
import struct
import sys
import tarfile
import zlib
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sample_pictures import BAD_PICTURES, animated, encode, image, pixels, png_header
from tiny_shards import add_member, keys, loader, plain_samples, take, write_tar

from evatool.core.errors import BadDataLimitError
from evatool.data.image.header import MAX_PIXELS
from evatool.data.image.nonstandard import nonstandard_cause

# --------------------------------------------------------------------------------------------------- R19: members


def jpeg(**options: Any) -> bytes:
    return image("JPEG", **options)


def with_exif(data: bytes) -> bytes:
    """A JPEG whose EXIF directory points to itself."""
    body = (
        b"Exif\0\0" + b"II*\0" + struct.pack("<IH", 8, 1) + struct.pack("<HHII", 0x112, 3, 1, 6) + struct.pack("<I", 8)
    )
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]


def wide_png() -> bytes:
    """A whole PNG with 16 bits a channel, which Pillow opens as plain RGB."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels().astype(np.uint16) * 257)
    start = png_header(32, 24, bit_depth=16)
    data = zlib.compress(rows)
    chunk = struct.pack(">I", len(data)) + b"IDAT" + data + struct.pack(">I", zlib.crc32(b"IDAT" + data))
    return start[: start.index(b"IDAT") - 4] + chunk + start[-12:]


GOOD = {
    "jpeg": {"jpg": jpeg()},
    "jpeg-name": {"jpeg": jpeg()},
    "upper-case": {"JPG": jpeg()},
    "webp": {"webp": image("WEBP")},
    "png-named-jpg": {"jpg": image("PNG")},
    "webp-named-png": {"png": image("WEBP")},
    "progressive": {"jpg": jpeg(progressive=True)},
    "grey-jpeg": {"jpg": image("JPEG", "L")},
    "palette": {"png": image("PNG", "P")},
    "1-bit": {"png": image("PNG", "1")},
    "grey-alpha": {"png": image("PNG", "LA")},
    "rgba": {"png": image("PNG", "RGBA")},
    "static-gif": {"png": image("GIF", "P")},
    "bmp": {"png": image("BMP")},
    "tiff": {"png": image("TIFF")},
    "two-in-one": {"jpg": animated("MPO")},
    "exif-loop": {"jpg": with_exif(jpeg())},
    "trailing-bytes": {"jpg": jpeg() + b"\0" * 5000},
    "bidi": {"txt": "\u202eabc\u202c \u200b".encode()},
    "control": {"txt": b"a\x00b\x07\x1b[31mc"},
    "long": {"txt": b"word " * 20_000},
    "many-members": {f"x{i}": b"y" for i in range(200)},
    "empty-json": {"json": b"{}"},
    "deep-json": {"json": b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}"},
    "concept-number": {"json": b'{"concept": 7}'},
    "bom": {"txt": b"\xef\xbb\xbfwords"},
    "surrogate": {"txt": None, "json": b'{"captions": ["a \\ud800 b"]}'},
}
ODD = {
    "cmyk": ({"jpg": jpeg(mode="CMYK")}, "cmyk"),
    "cmyk-progressive": ({"jpg": jpeg(mode="CMYK", progressive=True)}, "cmyk"),
    "cmyk-tiff": ({"png": image("TIFF", "CMYK")}, "cmyk"),
    "16-bit-grey": ({"png": BAD_PICTURES["16-bit-grey"]}, "16-bit"),
    "16-bit-rgb": ({"png": wide_png()}, "16-bit"),
    "float-tiff": ({"png": image("TIFF", "F")}, "16-bit"),
    "animated-gif-named-png": ({"png": animated("GIF")}, "animated"),
    "animated-webp": ({"webp": animated("WEBP")}, "animated"),
    "animated-png": ({"png": animated("PNG")}, "animated"),
    "lab-tiff": ({"png": image("TIFF", "LAB")}, "color-mode"),
}
BAD = {
    "no-picture": ({"png": None}, "no-picture"),
    "no-caption": ({"txt": None}, "no-caption"),
    "blank-caption": ({"txt": b" \n "}, "no-caption"),
    "zero-byte": ({"png": b""}, "zero-byte"),
    "text-as-picture": ({"png": b"GIF? no, this is text"}, "not-a-picture"),
    "cut-png": ({"png": BAD_PICTURES["cut-png"]}, "truncated"),
    "cut-webp": ({"png": BAD_PICTURES["cut-webp"]}, "truncated"),
    "cut-header": ({"png": BAD_PICTURES["cut-header"]}, ("truncated", "not-a-picture")),
    "cut-jpeg": ({"png": BAD_PICTURES["cut-jpeg"]}, "truncated"),
    "bomb-png": ({"png": BAD_PICTURES["20000x20000"]}, "too-large"),
    "zero-width": ({"png": png_header(0, 100)}, ("truncated", "not-a-picture")),
    "svg": ({"png": b'<svg xmlns="http://www.w3.org/2000/svg"/>'}, "not-a-picture"),
    "eps": (
        {"png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"},
        ("unsupported-format", "not-a-picture", "truncated"),
    ),
    "bad-utf8": ({"txt": b"caf\xe9"}, "bad-utf8"),
    "utf-16": ({"txt": "words".encode("utf-16")}, "bad-utf8"),
    "huge-caption": ({"txt": b"a" * (2**20 + 1)}, "huge-text"),
    "pickle-as-picture": ({"png": pickle.dumps({"a": 1})}, "not-a-picture"),
    "npy-as-picture": ({"png": b"\x93NUMPY\x01\x00"}, "not-a-picture"),
}
BAD_JSON: dict[str, tuple[dict[str, bytes | None], str]] = {
    "huge-json": ({"json": b'{"a": "' + b"b" * 2**20 + b'"}'}, "huge-text"),
    "broken-json": ({"json": b'{"a": '}, "bad-json"),
    "json-list": ({"json": b"[1, 2]"}, "bad-json"),
    "json-bomb": ({"json": b"[" * 200_000}, "bad-json"),
    "json-number": ({"json": b'{"a": ' + b"9" * 10_000 + b"}"}, "bad-json"),
    "json-utf8": ({"json": b'{"a": "\xff"}'}, "bad-utf8"),
    "empty-json": ({"json": b""}, "bad-json"),
    "json-string": ({"json": b'"words"'}, "bad-json"),
    "json-nan": ({"json": b"NaN"}, "bad-json"),
}


def corpus_tar(tmp_path: Path, name: str, change: dict[str, bytes | None]) -> Path:
    samples = plain_samples(range(15))
    odd: dict[str, bytes | None] = {"png": image(seed=99), "txt": b"odd words", **change}
    if any(e.lower() in ("jpg", "jpeg", "webp") for e in change):
        odd["png"] = change.get("png")
    samples["odd"] = {extension: data for extension, data in odd.items() if data is not None}
    return write_tar(tmp_path / f"{name}.tar", samples)


def test_r19_the_corpus_has_60_files() -> None:
    assert len(GOOD) + len(ODD) + len(BAD) + len(BAD_JSON) >= 60


@pytest.mark.parametrize("name", list(GOOD))
def test_r19_odd_members_that_are_used(tmp_path: Path, name: str) -> None:
    section: dict[str, Any] = {"train": corpus_tar(tmp_path, name, GOOD[name])}
    if name == "surrogate":
        section["caption"] = [{"member": "txt"}, {"member": "json", "field": "captions"}]
    found = loader(section, tokenizer=None)
    (batch,) = take(found, 1)
    assert "odd" in batch.keys
    assert not found.bad
    assert not found.counts()  # nor is it counted as converted
    assert batch.tokens.shape == (16, 8)


@pytest.mark.parametrize("name", list(BAD))
def test_r19_members_that_make_a_bad_sample(tmp_path: Path, name: str) -> None:
    change, causes = BAD[name]
    found = loader({"train": corpus_tar(tmp_path, name, change), "max_bad_fraction": 0.1})
    read = keys(take(found, 2))
    assert "odd" not in read
    (bad,) = found.bad.first
    assert bad.key == "odd"
    assert bad.cause in ([causes] if isinstance(causes, str) else causes)
    assert bad.shard.endswith(f"{name}.tar")


@pytest.mark.parametrize("name", list(BAD_JSON))
def test_r19_a_json_member_matters_only_where_captions_come_from_it(tmp_path: Path, name: str) -> None:
    change, cause = BAD_JSON[name]
    samples = {key: {**members, "json": b'{"captions": ["c"]}'} for key, members in plain_samples(range(15)).items()}
    tar = write_tar(tmp_path / "set.tar", {**samples, "odd": {"png": image(), "txt": b"words", **change}})
    found = loader({"train": tar, "max_bad_fraction": 0.0})
    assert sorted(keys(take(found, 1))) == sorted([*samples, "odd"])
    assert not found.bad
    found = loader({"train": tar, "max_bad_fraction": 0.1, "caption": "json-captions"})
    assert "odd" not in keys(take(found, 2))
    assert [(bad.key, bad.cause) for bad in found.bad.first] == [("odd", cause)]


@pytest.mark.parametrize("decode", ["fast", "exact", "scaled"])
@pytest.mark.parametrize("name", list(ODD))
def test_r19_odd_pictures_are_skipped_and_counted(tmp_path: Path, name: str, decode: str) -> None:
    change, cause = ODD[name]
    section = {"train": corpus_tar(tmp_path, name, change), "max_bad_fraction": 0.1, "decode": decode}
    found = loader(section, with_text=False)
    assert "odd" not in keys(take(found, 2))
    assert [(bad.key, bad.cause) for bad in found.bad.first] == [("odd", cause)]
    with pytest.raises(BadDataLimitError, match=f"1 {cause}"):
        take(loader({**section, "max_bad_fraction": 0.01}, with_text=False), 2)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.e2e)])
def test_r19_converted_pictures_are_used_counted_and_named(
    tmp_path: Path, num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    samples = plain_samples(range(32 - len(ODD)))
    for name, (change, _) in ODD.items():
        samples[name] = {extension: data for extension, data in change.items() if data is not None}
    tar = write_tar(tmp_path / "set.tar", samples)
    # The limit does not hold for them.
    section = {"train": tar, "nonstandard": "convert", "max_bad_fraction": 0.0, "num_workers": num_workers}
    found = loader(section, global_batch_size=32, with_text=False)
    batches = iter(found)
    read = [next(batches) for _ in range(2)]
    assert all(sorted(batch.keys) == sorted(samples) for batch in read)
    counts = {f"data/converted/{cause}": 0.0 for _, cause in ODD.values()}
    for _, cause in ODD.values():
        counts[f"data/converted/{cause}"] += 2
    assert found.counts() == {"data/converted": 2.0 * len(ODD), **counts}
    for name, (_, cause) in ODD.items():
        assert caplog.text.count(f"set.tar {name}: {cause}") == 1
    batches.close()
    assert "20 converted pictures read (" in caplog.text  # at the end


@pytest.mark.parametrize("name", list(ODD))
def test_r19_converted_pictures_are_pillows(tmp_path: Path, name: str) -> None:
    (data,) = ODD[name][0].values()
    assert nonstandard_cause(data, MAX_PIXELS)[0] == ODD[name][1]
    section = {"nonstandard": "convert", "decode": "exact", "augment": {"crop_scale": [1, 1], "crop_ratio": [1, 1]}}
    square = Image.open(io.BytesIO(data)).convert("RGB")
    read = {}
    for key, file in (("odd", data), ("plain", encode(square, "PNG"))):
        tar = write_tar(tmp_path / key / "set.tar", {"k": {"png": file}})
        read[key] = take(loader({"train": tar, **section}, global_batch_size=1, with_text=False), 1)[0].image
    assert torch.equal(read["odd"], read["plain"])


@pytest.mark.parametrize("decode", ["fast", "exact", "scaled"])
def test_r19_a_progressive_jpeg_is_an_ordinary_one(tmp_path: Path, decode: str) -> None:
    read = []
    for progressive in (False, True):
        samples = {f"k{i}": {"jpg": jpeg(seed=i, progressive=progressive, quality=90)} for i in range(8)}
        tar = write_tar(tmp_path / f"{progressive}" / "set.tar", samples)
        found = loader({"train": tar, "decode": decode, "max_bad_fraction": 0.0}, global_batch_size=8, with_text=False)
        read += take(found, 1)
        assert not found.counts()
    assert torch.equal(read[0].image, read[1].image)


def test_r19_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(14):
            add_member(tar, f"k{i:02d}.png", image(seed=i))
            add_member(tar, f"k{i:02d}.txt", b"words")
        for name in ("twice.png", "twice.txt", "twice.png"):  # two pictures in one sample
            add_member(tar, name, image() if name.endswith("png") else b"words")
        add_member(tar, "k03.png", image(seed=77))  # a key that comes again later is another sample
        add_member(tar, "k03.txt", b"others")
    for _ in range(2):  # scanned, then from the index
        found = loader({"train": path, "max_bad_fraction": 0.1})
        (batch,) = take(found, 1)
        assert [(bad.key, bad.cause) for bad in found.bad.first] == [("twice", "duplicate-member")]
        assert batch.keys.count("k03") >= 2


# ------------------------------------------------------------------------------------------------------ R20: bombs


def bombs() -> dict[str, bytes]:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    # 17,000 x 17,000: 0.9 GB as RGB, real data behind the header.
    packer = zlib.compressobj(9)
    row = b"\0" * (17_000 // 8 + 1)
    idat = b"".join(packer.compress(row) for _ in range(17_000)) + packer.flush()
    header = struct.pack(">IIBBBBB", 17_000, 17_000, 1, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", idat) + chunk(b"IEND", b"")
    small = io.BytesIO()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(small, "JPEG")
    jpg = small.getvalue()
    start = jpg.index(b"\xff\xc0")
    jpg = jpg[: start + 5] + struct.pack(">HH", 60_000, 60_000) + jpg[start + 9 :]
    gif = animated("GIF")
    gif = gif[:6] + struct.pack("<HH", 65_000, 65_000) + gif[10:]
    webp = image("WEBP")
    at = webp.index(b"\x9d\x01\x2a")
    webp = webp[: at + 3] + struct.pack("<HH", 16_383, 16_383) + webp[at + 7 :]
    return {"png": png, "jpg": jpg, "gif": gif, "webp": webp}


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "webp"])
def test_r20_bombs_are_refused_before_they_are_decoded(tmp_path: Path, kind: str) -> None:
    bomb = bombs()[kind]
    assert len(bomb) < 50_000
    samples = plain_samples(range(15))
    samples["odd"] = {"png": bomb, "txt": b"words"}
    found = loader({"train": write_tar(tmp_path / "set.tar", samples), "max_bad_fraction": 1.0})
    take(found, 2)
    assert [(bad.key, bad.cause) for bad in found.bad.first] == [("odd", "too-large")]


@pytest.mark.dist
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_r20_a_loader_process_stays_as_small_with_a_bomb(tmp_path: Path) -> None:
    sizes = {}
    for kind, bomb in {"none": image("PNG"), **bombs()}.items():
        samples = plain_samples(range(15)) | {"odd": {"png": bomb, "txt": b"words"}}
        tar = write_tar(tmp_path / kind / "set.tar", samples)
        found = loader({"train": tar, "max_bad_fraction": 1.0, "num_workers": 1})
        batches = iter(found)
        for _ in range(3):
            next(batches)
        (worker,) = active_children()
        sizes[kind] = peak_bytes(worker.pid)
        batches.close()
        assert [(bad.key, bad.cause) for bad in found.bad.first] == [("odd", "too-large")] * (kind != "none")
    assert max(sizes.values()) - sizes["none"] < 64 * 2**20, sizes


def peak_bytes(pid: int | None) -> int:
    """The most memory that a process has had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
