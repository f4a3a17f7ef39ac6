"""The table of fuzzers, and those of weights, images, recipes and suites; training data are in `data_fuzzers`."""

from __future__ import annotations

import io
import json
import pickle
import random
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tests.fuzz.data_fuzzers import DATA_FUZZERS
from tests.fuzz.harness import Fuzzer

# --------------------------------------------------------------------------------------------------------- weights


def weight_seeds(folder: Path) -> Sequence[bytes]:
    """Small weight files of every kind: torch's archives of both formats, safetensors, an index of shards."""
    import torch
    from safetensors.torch import save

    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.float16)}
    found = [save(tensors, metadata={"format": "pt"})]
    nested = {"model": tensors, "epoch": 3, "args": {"lr": 1e-3, "names": ["x", "y"], "size": (1, 2)}}
    for tree in (tensors, nested, OrderedDict(tensors)):
        for is_zip in (True, False):
            out = io.BytesIO()
            torch.save(tree, out, _use_new_zipfile_serialization=is_zip)
            found.append(out.getvalue())
    plain = [pickle.dumps({"x": [1, 2.5, "t", b"b", None, True, (1,), {2}]}, protocol) for protocol in range(6)]
    found.append(json.dumps({"weight_map": {"a": "model-1.safetensors"}}).encode())
    return found + plain


def read_weights_file(data: bytes, folder: Path) -> None:
    """Open the file and read every tensor."""
    from evatool.weights.open import open_weights

    path = folder / ("model.index.json" if data[:1] == b"{" else "weights")
    path.write_bytes(data)
    tensors = open_weights(path)
    for name in tensors:
        tensors[name]


# ---------------------------------------------------------------------------------------------------------- images

IMAGE_FORMATS = {
    "JPEG": [{"quality": 80}, {"progressive": True}, {"quality": 95, "subsampling": 0}],
    "PNG": [{}, {"compress_level": 0}],
    "WEBP": [{}, {"lossless": True}],
    "GIF": [{}],
    "BMP": [{}],
    "TIFF": [{}, {"compression": "tiff_lzw"}, {"compression": "jpeg"}],
    "PPM": [{}],
    "JPEG2000": [{}],
    "AVIF": [{}],
}


def image_seeds(folder: Path) -> Sequence[bytes]:
    """Small images of every format and kind of pixel that is read."""
    from PIL import Image

    found = []
    for mode in ("RGB", "L", "P", "RGBA", "CMYK", "I;16"):
        image = Image.effect_noise((33, 17), 80).convert("L")
        image = image.convert(mode) if mode != "I;16" else image.convert("I").convert("I;16")
        for kind, variants in IMAGE_FORMATS.items():
            for options in variants:
                out = io.BytesIO()
                try:
                    image.save(out, kind, **options)
                except (OSError, KeyError, ValueError):  # the format has no such pixels
                    continue
                found.append(out.getvalue())
    out = io.BytesIO()
    frames = [Image.new("RGB", (9, 9), (i, 0, 0)) for i in range(3)]
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    return [*found, out.getvalue()]


def read_image(data: bytes, folder: Path) -> None:
    """Every way in: the judgement before packing, training in each mode, evaluation in both."""
    from evatool.data.image.decode import decode_eval_image, decode_image, decode_rgb
    from evatool.data.image.header import BadImage
    from evatool.data.image.nonstandard import nonstandard_cause

    refused = 0
    ways = [
        decode_rgb,
        partial(nonstandard_cause, max_pixels=10**6),
        partial(decode_image, max_pixels=10**6, mode="exact"),
        partial(decode_image, max_pixels=10**6, mode="fast"),
        partial(decode_image, max_pixels=10**6, mode="scaled", min_side=8),
        partial(decode_eval_image, size=8, decode="exact"),
    ]
    for way in ways:
        try:
            way(data)
        except BadImage:
            refused += 1
    if refused >= len(ways) - 1:
        raise BadImage("truncated")


def _image_refusals() -> tuple[type[BaseException], ...]:
    from evatool.data.image.header import BadImage

    return (BadImage,)


# --------------------------------------------------------------------------------------------- recipes and suites

TOML_WORDS = tuple(
    word.encode()
    for word in (
        *("[", "]", "[[", "]]", "{", "}", "=", ".", ",", '"', '"""', "'", "#", "\n", "\\u0000", "\\uD800", "\ufeff"),
        *(
            "1e26",
            "nan",
            "inf",
            "-1",
            "true",
            "[]",
            "{}",
            '""',
            "0x7fffffffffffffff",
            "1979-05-27",
            "99999999999999999999",
        ),
        *('extends = "self.toml"\n', "unset = []\n", "stage = []\n", 'kind = "none"\n', "[train]\n", "[data]\n"),
    )
)


def recipe_seeds(folder: Path) -> Sequence[bytes]:
    """The debug and demo recipes as they are shipped, resolved into one file each."""
    from evatool.recipe.load import list_recipes, load_recipe
    from evatool.recipe.write import to_toml

    names = [name for name, _, _ in list_recipes() if name.startswith(("debug/", "demo/"))]
    resolved = [to_toml(load_recipe(name).recipe).encode() for name in names]
    return [*resolved, *(f'extends = "{name}"\n[train]\nseed = 1\n'.encode() for name in names)]


def read_recipe(data: bytes, folder: Path) -> None:
    """Load the recipe, write it, and change it by `--set`."""
    from evatool.recipe.load import load_recipe
    from evatool.recipe.write import to_toml

    path = folder / "self.toml"
    path.write_bytes(data)
    to_toml(load_recipe(path, ["train.seed=2"] if len(data) % 2 else []).recipe)


def changed_lines(data: bytes, rng: random.Random) -> bytes:
    """Lines of a recipe dropped, doubled, swapped, or given another line's value."""
    lines = data.split(b"\n")
    for _ in range(rng.choice((1, 2, 4))):
        a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
        match rng.randrange(5):
            case 0:
                lines[a : a + 1] = []
            case 1:
                lines.insert(b, lines[a])
            case 2:
                lines[a], lines[b] = lines[b], lines[a]
            case 3:
                lines[a] = lines[a].partition(b"=")[0] + b"=" + lines[b].partition(b"=")[2]
            case 4:
                lines[a] = lines[a].partition(b"=")[0] + b"= " + rng.choice(TOML_WORDS)
        lines = lines or [b""]
    return b"\n".join(lines)


def suite_seeds(folder: Path) -> Sequence[bytes]:
    """The suites that are shipped."""
    from evatool.eval import suite

    return [path.read_bytes() for path in sorted((Path(suite.__file__).parent / "suites").glob("*.toml"))]


def read_suite(data: bytes, folder: Path) -> None:
    """Load the suite file."""
    from evatool.eval.suite import load_suite

    path = folder / "suite.toml"
    path.write_bytes(data)
    load_suite(str(path))


PICKLE_WORDS = tuple(
    word
    for word in (
        *(
            b"\x8c\x01x",
            b"X\x01\x00\x00\x00x",
            b"r\xff\xff\xff\x07",
            b"j\xff\xff\xff\x07",
            b"\x8e\xff\xff\xff\xff\0\0\0\0",
        ),
        *(
            b"ctorch._utils\n_rebuild_tensor_v2\n",
            b"ccollections\nOrderedDict\n",
            b"cbuiltins\nstr\n",
            b"q\x00",
            b"h\x00",
        ),
        *(
            b"(",
            b")",
            b"}",
            b"]",
            b"\x85",
            b"\x86",
            b"\x87",
            b"R",
            b"b",
            b"s",
            b"u",
            b"a",
            b"e",
            b"Q",
            b"0",
            b"2",
            b".",
        ),
        *(b"q\x00", b"h\x00", b"."),
        *(b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"data.pkl", b'"dtype":"F32"', b'"shape":[', b"data_offsets"),
    )
)
IMAGE_WORDS = (
    *(b"\xff\xd8", b"\xff\xd9", b"\xff\xda", b"\xff\xc0", b"\xff\xc2", b"\xff\xc4", b"\xff\xdd", b"\xff\xe1Exif\0\0"),
    *(b"IHDR", b"IDAT", b"IEND", b"iCCP", b"zTXt", b"acTL", b"fcTL", b"tRNS", b"PLTE", b"eXIf"),
    *(b"RIFF", b"WEBP", b"VP8 ", b"VP8L", b"VP8X", b"ANIM", b"ANMF", b"GIF89a", b"II*\0", b"MM\0*", b"ftypavif"),
)

FUZZERS = {
    fuzzer.name: fuzzer
    for fuzzer in (
        Fuzzer("weights", weight_seeds, read_weights_file, PICKLE_WORDS),
        Fuzzer("images", image_seeds, read_image, IMAGE_WORDS, _image_refusals()),
        Fuzzer("recipes", recipe_seeds, read_recipe, TOML_WORDS, mutate=changed_lines),
        Fuzzer("suites", suite_seeds, read_suite, TOML_WORDS, mutate=changed_lines),
        *DATA_FUZZERS,
    )
}
