"""Small files that ask for much: one of each kind, written to a folder. Every one of them is to be refused."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

from PIL import Image

MIB = 2**20


def archive(data: bytes, *, method: int = zipfile.ZIP_STORED, members: dict[str, bytes] | None = None) -> bytes:
    """A zip archive as torch writes it, with the given `data.pkl`."""
    out = BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        file.writestr("archive/data.pkl", data)
        for name, content in (members or {}).items():
            file.writestr(name, content)
    return out.getvalue()


def shared(depth: int, make: Callable[[object], object]) -> object:
    """A nest in which each level holds the one before twice."""
    value: object = {}
    for _ in range(depth):
        value = make(value)
    return value


class Call:
    """Pickles as a call of a function by name."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> object:
        return self.call


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor(size: tuple[int, ...], stride: tuple[int, ...], numel: int) -> bytes:
    """A pickle of {"a": tensor of this shape in a storage of `numel` floats}."""

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"\x8a\x09" + v.to_bytes(9, "little", signed=True) for v in values) + b"t"

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
    storage += b"\x8a\x09" + numel.to_bytes(9, "little", signed=True) + b"tQ"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + numbers(size) + numbers(stride)
    return b"\x80\x02}" + text("a") + call + b"\x89ccollections\nOrderedDict\n)RtRs."


def pickles() -> dict[str, bytes]:
    """`data.pkl` that asks for more than it has."""
    opcodes = {
        "long-binput": b"}r\xff\xff\xff\x07.",
        "long-binget": b"j\xff\xff\xff\x07.",
        "put-text": b"}p99999999999\n.",
        "binunicode": b"X\xff\xff\xff\x7f.",
        "binunicode8": b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
        "binbytes8": b"\x8e\xff\xff\xff\xff\x07\x00\x00\x00.",
        "bytearray8": b"\x96\xff\xff\xff\xff\x07\x00\x00\x00.",
        "frame": b"\x95\xff\xff\xff\xff\x07\x00\x00\x00}.",
        "long4": b"\x8b\xff\xff\xff\x7f.",
        "int-text": b"I" + b"9" * 2_000_000 + b"\n.",
        "long-text": b"L" + b"9" * 2_000_000 + b"L\n.",
        "lists": b"]" * 20_000_000 + b".",
        "marks": b"(" * 30_000_000 + b".",
        "nothing": b"N0" * 30_000_000 + b".",
        "list-copies": b"("
        + b"K\x01" * 1_000_000
        + b"l0"
        + b"("
        + b"K\x01" * 1_000_000
        + b"lq\x000"
        + b"cbuiltins\nlist\nq\x010"
        + b"h\x01h\x00\x85R" * 2000
        + b".",
        "text-of-a-nest": b"}q\x000" + b"h\x00h\x00\x86q\x000" * 60 + b"cbuiltins\nstr\nh\x00\x85R.",
        "key-of-a-nest": b")q\x000" + b"h\x00h\x00\x86q\x000" * 60 + b"}h\x00K\x01s.",
        "set-of-a-nest": b")q\x000" + b"h\x00h\x00\x86q\x000" * 60 + b"\x8f(h\x00\x90.",
        "colliding-keys": b"}("
        + b"".join(b"\x8a\x0b" + (n * (2**61 - 1)).to_bytes(11, "little", signed=True) + b"N" for n in range(1, 60_000))
        + b"u.",
        "state-of-a-function": b"ctorch._utils\n_rebuild_parameter\n}" + text("x") + b"K\x01sb.",
        "expanded-tensor": tensor((10**12,), (0,), 1),
        "huge-storage": tensor((10**12,), (1,), 10**12),
        "huge-stride": tensor((2, 2), (2**61, 1), 4),
    }
    found = {name: code if code[:1] == b"\x80" else b"\x80\x04" + code for name, code in opcodes.items()}
    for name, make in {
        "shared-tables": lambda value: {"a": value, "b": value},
        "shared-lists": lambda value: [value, value],
        "shared-tuples": lambda value: (value, value),
    }.items():
        found[name] = pickle.dumps({"model": shared(60, make)}, 2)
    return found


def small_pickles() -> dict[str, bytes]:
    """Those of at most 2 kB."""
    return {name: data for name, data in pickles().items() if len(data) <= 2048}


def weight_files(folder: Path) -> list[Path]:
    """Every bomb among weight files."""
    made: dict[str, bytes] = {}
    for name, data in pickles().items():
        made[f"zip-{name}.pt"] = archive(data)
        made[f"old-{name}.pt"] = (
            b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})) + data
        )
    zeros = b"\0" * (300 * MIB)
    made["zip-bomb.pt"] = archive(zeros, method=zipfile.ZIP_DEFLATED)
    made["zip-bomb-data.pt"] = archive(
        tensor((75 * MIB,), (1,), 75 * MIB), method=zipfile.ZIP_DEFLATED, members={"archive/data/0": zeros}
    )
    del zeros
    lying = bytearray(archive(b"\x80\x02}."))
    at = lying.rfind(b"PK\x01\x02")
    lying[at + 20 : at + 28] = b"\xf0\xff\xff\xff" * 2
    made["zip-lying-size.pt"] = bytes(lying)
    made["zip-many-members.pt"] = directory_only(300_000)
    made.update(safetensors_bombs())
    made["itself.index.json"] = json.dumps({"weight_map": {"a": "itself.index.json"}}).encode()
    made["outside.index.json"] = json.dumps({"weight_map": {"a": "../outside.index.json"}}).encode()
    made["deep.index.json"] = b'{"weight_map":' * 100_000
    made["lists.index.json"] = b"[" + b"[]," * 10_000_000 + b"[]]"
    return [write(folder, name, data) for name, data in made.items()]


def recipe_files(folder: Path) -> list[Path]:
    """Every bomb among recipes; of those that extend others, the last."""
    (folder / "0.toml").write_text('stage = "train-clip"\n[train]\nno_such_key = 1\nunset = 3\n')
    for n in range(1, 30):
        (folder / f"{n}.toml").write_text(f'extends = ["{n - 1}.toml", "{n - 1}.toml"]\nunset = ["gone"]\n')
    for n in range(200):
        (folder / f"long-{n}.toml").write_text(f'extends = "long-{n + 1}.toml"\n')
    for n in range(150):
        (folder / f"wide-{n}.toml").write_text(f"[a{n}]\n")
    wide = ", ".join(f'"wide-{n}.toml"' for n in range(150))
    made = {
        "wide.toml": f"extends = [{wide}]".encode(),
        "arrays.toml": b"a = " + b"[" * 100_000,
        "tables.toml": b"a = " + b"{a=" * 100_000,
        "dots.toml": b"a" + b".a" * 400_000 + b" = 1",
        "head.toml": b"[a" + b".a" * 400_000 + b"]",
        "quoted-dots.toml": b'"a"' + b'."a"' * 200_000 + b" = 1",
        "keys.toml": b'stage = "train-clip"\n' + b"".join(b"k%d = 1\n" % n for n in range(100_000)),
        "unknown.toml": b'stage = "train-clip"\n' + b"".join(b"k%d = 1\n" % n for n in range(4_000)),
        "long-key.toml": b'stage = "train-clip"\n' + b"k" * 1_000_000 + b" = 1\n",
        "long-unset.toml": b'stage = "train-clip"\nunset = ["' + b"k" * 1_000_000 + b'"]\n',
        "dotted-unset.toml": b'stage = "train-clip"\nunset = ["a' + b".a" * 400_000 + b'"]\n',
        "long-stage.toml": b'stage = "' + b"train" * 200_000 + b'"\n',
        "empty-arrays.toml": b"a = [" + b"[]," * 690_000 + b"]",
        "number.toml": b"a = " + b"9" * 1_000_000,
        "spaces.toml": b" " * 95_000_000,
        "latin.toml": b"a = '\xe9'",
        "stage-array.toml": b"stage = []",
    }
    last = [folder / "29.toml", folder / "long-0.toml"]
    return [*last, *(write(folder, name, data) for name, data in made.items())]


def suite_files(folder: Path) -> list[Path]:
    """Every bomb among suites."""
    head = 'name = "x"\ntitle = "x"\nabout = "x"\nprepare = "x"\n'
    made = {
        "self.toml": f'{head}[include]\nsuite = "{folder}/self.toml"\nsets = []\n'.encode(),
        "gone.toml": f'{head}[include]\nsuite = "drawings"\nsets = ["{"k" * 400_000}"]\n'.encode(),
        "arrays.toml": b"a = " + b"[" * 100_000,
        "dots.toml": b"a" + b".a" * 400_000 + b" = 1",
        "sets.toml": b"sets = 3",
        "sets-of-numbers.toml": b"sets = [" + b"1," * 400_000 + b"]",
        "spaces.toml": b" " * 95_000_000,
        "latin.toml": b"a = '\xe9'",
    }
    return [write(folder, f"suite-{name}", data) for name, data in made.items()]


PATTERNS = (
    "{0..9}" * 9 + ".tar",
    "{000000000..999999999}.tar",
    "{a,b}" * 40 + ".tar",
    "{a,b}" * 20_000,
    "{" * 50_000 + "}" * 50_000 + "{0..9999999}",
    "x{0..499999}" + "y" * 99_000,
    "*" * 1000 + ".tar",
    "{0..99999}" * 10_001,
)
"""Patterns of shards that name too much."""


def json_files(folder: Path) -> list[Path]:
    """Every bomb among JSON files."""
    made = {
        "lists.json": b"[" + b"[]," * 30_000_000 + b"[]]",
        "tables.json": b"[" + b'{"":1},' * 10_000_000 + b"1]",
        "numbers.json": b"[" + b"1111," * 15_000_000 + b"1]",
        "texts.json": b"[" + b'"abc",' * 12_000_000 + b"1]",
        "deep.json": b"[" * 90_000_000,
        "deep-whole.json": b"[" * 5_000 + b"]" * 5_000,
        "deep-tables.json": b'{"a":' * 900 + b"1" + b"}" * 900,
        "wide-text.json": b'["' + "\U0001f600".encode() * 20_000_000 + b'"]',
        "digits.json": b"9" * 50_000_000,
    }
    return [write(folder, name, data) for name, data in made.items()]


def directory_only(count: int) -> bytes:
    """A zip archive whose directory lists `count` empty members in one place."""
    local = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 0, 0, 0, 0, 0, 0, 1, 0) + b"x"
    entries = [
        struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0) + b"%06d" % n
        for n in range(count)
    ]
    directory = b"".join(entries)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, len(directory), len(local), 0)
    return local + directory + end


def safetensors_bombs() -> dict[str, bytes]:
    """Safetensors files with headers that are too long, too deep, or that lie."""

    def file(header: bytes, data: bytes = b"") -> bytes:
        return struct.pack("<Q", len(header)) + header + data

    def entry(shape: list[int], begin: int, end: int) -> dict[str, object]:
        return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}

    many = (
        b"{" + b",".join(b'"%06d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(1_000_000)) + b"}"
    )
    return {
        "st-many.safetensors": file(many),
        "st-lists.safetensors": file(b'{"a":[' + b"[]," * 5_000_000 + b"[]]}"),
        "st-big-lists.safetensors": file(b'{"a":[' + b"[]," * 30_000_000 + b"[]]}"),
        "st-spaces.safetensors": file(b"{" + b" " * 95_000_000 + b"}"),
        "st-deep.safetensors": file(b'{"a":' * 200_000),
        "st-metadata.safetensors": file(
            b'{"__metadata__":{' + b",".join(b'"%d":"x"' % n for n in range(1_000_000)) + b"}}"
        ),
        "st-overlap.safetensors": file(
            json.dumps({"a": entry([4], 0, 16), "b": entry([4], 0, 16)}).encode(), b"\0" * 16
        ),
        "st-overflow.safetensors": file(json.dumps({"a": entry([2**62, 2**62], 0, 16)}).encode(), b"\0" * 16),
        "st-many-sides.safetensors": file(json.dumps({"a": entry([2**62] * 200_000, 0, 16)}).encode(), b"\0" * 16),
        "st-long-length.safetensors": struct.pack("<Q", 2**62) + b"{}",
    }


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *chunks: bytes, pixels: bytes = b"") -> bytes:
    """A PNG of RGB pixels with chunks before its data."""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = png_chunk(b"IDAT", pixels or zlib.compress(b"\0" * (3 * width + 1) * height, 1))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + body + png_chunk(b"IEND", b"")


def small_jpeg(width: int, height: int, **options: object) -> bytes:
    """A JPEG of one colour."""
    out = BytesIO()
    Image.new("RGB", (width, height), (90, 120, 30)).save(out, "JPEG", **options)
    return out.getvalue()


def claimed(data: bytes, side: int) -> bytes:
    """A JPEG whose header names other sides."""
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    return data[: at + 5] + side.to_bytes(2, "big") * 2 + data[at + 9 :]


def tiff(tags: list[tuple[int, int, int, int]], tail: bytes = b"") -> bytes:
    """A TIFF of one directory of (tag, type, count, value or place)."""
    entries = b"".join(struct.pack("<HHLL", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<LH", 8, len(tags)) + entries + struct.pack("<L", 0) + tail


def image_files(folder: Path) -> list[Path]:
    """Every bomb among images."""
    text = zlib.compress("\U0001f600".encode() * 250_000)
    cut = small_jpeg(640, 480, quality=95)
    noise = BytesIO()
    Image.effect_noise((640, 480), 90).save(noise, "JPEG")
    comment = b"!\xfe" + (b"\xff" + b"x" * 255) * 150_000 + b"\0"
    frame = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\0"
    gif = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\0" * 6
    many = [(700 + n, 7, 1_000_000, 8) for n in range(60_000)]
    basic = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), (262, 3, 1, 1)]
    exif = b"Exif\0\0" + tiff([(40_000 + n, 7, 30_000, 8) for n in range(2_500)])
    made = {
        "claims-9000.jpg": claimed(small_jpeg(8, 8), 9000),
        "claims-9000-progressive.jpg": claimed(small_jpeg(8, 8, progressive=True), 9000),
        "claims-after-garbage.jpg": claimed(small_jpeg(8, 8), 9000).replace(b"\xff\xda", b"xx\xff\xda", 1),
        "ends-early.jpg": noise.getvalue()[:20_000] + b"\xff\xd9",
        "ends-early-progressive.jpg": small_jpeg(4000, 4000, progressive=True, quality=98)[:30_000] + b"\xff\xd9",
        "cut.jpg": cut[: len(cut) // 2],
        "progressive-444.jpg": small_jpeg(9400, 9400, progressive=True, subsampling=0),
        "exif-many.jpg": cut[:2] + (b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif) + cut[2:1000],
        "too-large.png": png(30_000, 30_000, pixels=zlib.compress(b"\0" * 1000)),
        "cut.png": png(4000, 4000)[:-2000],
        "short.png": png(9400, 9400, pixels=zlib.compress(b"\0" * (3 * 9400 + 1) * 9399, 1)),
        "no-data.png": png(9000, 9000, pixels=zlib.compress(b"\0" * 100)),
        "texts.png": png(4, 4, *[png_chunk(b"iTXt", b"a\0\1\0\0\0" + text)] * 60),
        "profile.png": png(4, 4, png_chunk(b"iCCP", b"a\0\0" + zlib.compress(b"\0" * 200_000_000, 1))),
        "chunks.png": png(4, 4, png_chunk(b"abCd", b"") * 4_000_000),
        "comments.gif": gif + comment + frame + b";",
        "tags.tif": tiff(basic + many, b"\0" * 1_000_000),
        "numbers.tif": tiff([*basic, (273, 4, 20_000_000, 200)], b"\0" * 80_000_000),
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='99999' height='99999'/>" * 100_000,
    }
    out = BytesIO()
    Image.new("RGB", (12_000, 12_000)).save(out, "WEBP", lossless=True)
    made["large.webp"] = out.getvalue()
    return [write(folder, name, data) for name, data in made.items()]


def accepted_images(folder: Path) -> list[Path]:
    """Images that are accepted, just under the limit of pixels, and small as files."""
    made = {"9400.png": png(9400, 9400), "9400.jpg": small_jpeg(9400, 9400), "4400.png": png(4400, 4400)}
    made["6000-progressive.jpg"] = small_jpeg(6000, 6000, progressive=True)
    for name, kind, side in (("4400.webp", "WEBP", 4400), ("2200.webp", "WEBP", 2200), ("9000.gif", "GIF", 9000)):
        out = BytesIO()
        Image.new("P" if kind == "GIF" else "RGB", (side, side)).save(out, kind)
        made[name] = out.getvalue()
    frame = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\0"
    gif = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\0" * 6
    made["frames.gif"] = gif + frame * 1_000_000 + b";"
    return [write(folder, name, data) for name, data in made.items()]


def write(folder: Path, name: str, data: bytes) -> Path:
    """The file."""
    path = folder / name
    path.write_bytes(data)
    return path
