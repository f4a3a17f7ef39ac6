"""Small files that ask for much: what is refused is cheap, an accepted image costs 4 bytes a pixel (docs/limits.md)."""

from __future__ import annotations

import json
import os
import pickle
import socket
import time
from collections.abc import Callable
from pathlib import Path

import bombs
import pytest
from costs import Cost, costs_of
from PIL import Image

from evatool.core.bounded_json import JsonBoundError, parse_json, read_json
from evatool.core.bounded_toml import parse_toml
from evatool.core.errors import CheckpointError, DataError, EvatoolError, RecipeError
from evatool.core.regular_files import NotRegularFileError, open_regular, read_regular
from evatool.data.eval.samples import FileSamples
from evatool.data.sources.shard_list import expand
from evatool.data.tar.index import read_index, read_index_head
from evatool.eval.report.gallery import data_uri
from evatool.eval.suite import load_suite
from evatool.recipe.load import load_recipe
from evatool.weights.open import open_weights

FREE_BYTES = 64 * 2**20
IMAGE_READERS = ("train_image", "train_image_exact", "eval_image", "packed_image")


@pytest.fixture
def special(tmp_path: Path) -> dict[str, Path]:
    """A pipe, a socket, a device and a folder."""
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    (tmp_path / "folder").mkdir()
    return {"a named pipe": tmp_path / "pipe", "a socket": tmp_path / "socket", "a folder": tmp_path / "folder"} | {
        "a device": Path("/dev/zero")
    }


def test_only_regular_files_are_opened(special: dict[str, Path]) -> None:
    for kind, path in special.items():
        with pytest.raises(NotRegularFileError, match=f"not a regular file but {kind}"):
            open_regular(path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "model.index.json", "recipe.toml", "suite.toml"])
def test_a_pipe_in_place_of_a_file_is_refused(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    read: Callable[[Path], object] = load_recipe if name == "recipe.toml" else open_weights
    read = (lambda path: load_suite(str(path))) if name == "suite.toml" else read
    with pytest.raises(EvatoolError):
        read(tmp_path / name)


@pytest.mark.parametrize(
    "read",
    [
        lambda path: FileSamples([path], [0], path.parent).image(0),
        lambda path: read_index(path),
        lambda path: read_index_head(path),
        lambda path: data_uri(path),
    ],
    ids=["image of a set", "index of a tar", "head of an index", "picture of a report"],
)
def test_a_pipe_behind_a_list_of_files_is_refused(read: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")  # it was a file when it was listed
    with pytest.raises((DataError, OSError), match="not a regular file but a named pipe"):
        read(tmp_path / "pipe.png")


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = bombs.write(tmp_path, "a", b"12345")
    assert read_regular(path, 5) == b"12345"
    with pytest.raises(OSError, match="the file has 5 bytes, and at most 4 are read"):
        read_regular(path, 4)


@pytest.mark.parametrize("text", ["[" * 101 + "]" * 101, '{"a":' * 200 + "1" + "}" * 200, "[" * 100_000])
def test_deep_json_is_refused(text: str) -> None:
    with pytest.raises(JsonBoundError, match="nested more than 100 deep"):
        parse_json(text)


def test_json_that_fits_is_read(tmp_path: Path) -> None:
    value = {"a": [[1, 2.5, "\u00e9", None, True]] * 1000}
    assert read_json(bombs.write(tmp_path, "a.json", json.dumps(value).encode())) == value
    assert parse_json("[" * 100 + "]" * 100)
    with pytest.raises(JsonBoundError, match="MiB of memory"):
        parse_json(b"[" + b"[]," * 500_000 + b"[]]")


def test_keys_of_many_parts_are_refused_and_other_dots_are_not() -> None:
    assert parse_toml("a.b.c = 1\n# " + "." * 500 + '\nurl = "' + "a." * 500 + '"\nx = [1.5, ' + "2.5, " * 500 + "]\n")
    for text in ("a" + ".a" * 40 + " = 1", "[a" + " . a" * 40 + "]", "x = { a" + ".b" * 40 + " = 1 }"):
        with pytest.raises(ValueError, match="more than 32 parts"):
            parse_toml(text)


@pytest.mark.parametrize("name", sorted(n for n, data in bombs.small_pickles().items()))
def test_a_pickle_that_asks_for_more_than_it_has_is_refused(name: str, tmp_path: Path) -> None:
    path = bombs.write(tmp_path, "a.pt", bombs.archive(bombs.small_pickles()[name]))
    begin = time.process_time()
    with pytest.raises(CheckpointError):
        dict(open_weights(path))
    assert time.process_time() - begin < 5


def test_a_file_that_a_recipe_extends_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "0.toml").write_text('extends = "debug/train-clip"\n')
    for n in range(1, 30):
        (tmp_path / f"{n}.toml").write_text(f'extends = ["{n - 1}.toml", "{n - 1}.toml"]\n')
    assert load_recipe(tmp_path / "29.toml").recipe.stage == "train-clip"


@pytest.mark.parametrize(
    ("text", "said"),
    [("stage = []", "is no stage"), ("a = '\udce9'", "not UTF-8"), ("a = " + "[" * 5000, "nested too deep")],
)
def test_a_recipe_that_makes_no_sense_is_refused_in_words(text: str, said: str, tmp_path: Path) -> None:
    path = bombs.write(tmp_path, "a.toml", text.encode("utf-8", "surrogateescape"))
    with pytest.raises(RecipeError, match=said):
        load_recipe(path)


def test_suites_that_include_each_other_are_refused(tmp_path: Path) -> None:
    head = 'name = "x"\ntitle = "x"\nabout = "x"\nprepare = "x"\n'
    for name, other in (("a", "b"), ("b", "a")):
        text = f'{head}[include]\nsuite = "{tmp_path}/{other}.toml"\nsets = []\n'
        (tmp_path / f"{name}.toml").write_text(text)
    with pytest.raises(RecipeError, match="include each other in a circle"):
        load_suite(str(tmp_path / "a.toml"))


@pytest.mark.parametrize("number", range(len(bombs.PATTERNS)))
def test_a_pattern_that_names_too_much_is_refused(number: int) -> None:
    with pytest.raises(DataError, match=r"names \d+ shards|10\^30|too long"):
        expand(bombs.PATTERNS[number])


def test_the_refusal_of_a_pattern_names_it_and_its_count() -> None:
    with pytest.raises(DataError, match=r"the pattern names 1099511627776 shards\nwhere: \{a,b\}\{a,b\}"):
        expand("{a,b}" * 40)


def test_an_index_of_weights_stays_in_its_folder(tmp_path: Path) -> None:
    for name in ("a.index.json", "../a.index.json", "a/b", "x" * 5000, "\0", ""):
        path = bombs.write(tmp_path, "a.index.json", json.dumps({"weight_map": {"t": name}}).encode())
        with pytest.raises(CheckpointError):
            open_weights(path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["weights", "recipe", "suite", "shards", "json_file"])
def test_what_is_refused_is_cheap(kind: str, tmp_path: Path) -> None:
    makers = {"weights": bombs.weight_files, "recipe": bombs.recipe_files, "suite": bombs.suite_files}
    make = makers | {"json_file": bombs.json_files, "shards": lambda folder: bombs.PATTERNS}
    cases = [(f"readers:{kind}", str(case)) for case in make[kind](tmp_path)]
    found = costs_of(cases, [cases[0]])
    assert [problem for case, cost in zip(cases, found, strict=True) if (problem := _too_much(case[1], cost))] == []


@pytest.mark.slow
def test_images_that_are_refused_are_cheap(tmp_path: Path) -> None:
    cases = [(f"readers:{reader}", str(p)) for p in bombs.image_files(tmp_path) for reader in IMAGE_READERS]
    found = costs_of(cases, _warm_images(tmp_path))
    assert [problem for case, cost in zip(cases, found, strict=True) if (problem := _too_much(case[1], cost))] == []


@pytest.mark.slow
def test_an_accepted_image_costs_four_bytes_a_pixel(tmp_path: Path) -> None:
    sides = {path: _pixels(path) for path in bombs.accepted_images(tmp_path)}
    cases = [(f"readers:{reader}", str(path)) for path in sides for reader in IMAGE_READERS[:3]]
    for (reader, path), cost in zip(cases, costs_of(cases, _warm_images(tmp_path)), strict=True):
        assert cost.error == "", (reader, path)
        bytes_a_pixel = 18 if path.endswith(".webp") else 4  # its decoder holds four copies: docs/limits.md
        assert cost.peak_bytes <= bytes_a_pixel * sides[Path(path)] + FREE_BYTES, (reader, path, cost.peak_bytes >> 20)


def _pixels(path: Path) -> int:
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path) as image:
            return image.width * image.height
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _warm_images(folder: Path) -> list[tuple[str, str]]:
    path = bombs.write(folder, "warm.jpg", bombs.small_jpeg(64, 64))
    other = bombs.write(folder, "warm.png", bombs.png(64, 64))
    return [(f"readers:{reader}", str(p)) for p in (path, other) for reader in IMAGE_READERS]


def _too_much(argument: str, cost: Cost) -> str | None:
    size = Path(argument).stat().st_size if argument.startswith("/") else len(argument)
    kinds = ("CheckpointError", "RecipeError", "DataError", "BadImage", "JsonBoundError", "JSONDecodeError")
    is_right = cost.error.startswith((*kinds, "ValueError"))
    is_right = is_right and cost.peak_bytes <= FREE_BYTES + 2 * size and cost.cpu_sec <= 10
    seen = f"{cost.peak_bytes >> 20} MiB, {cost.cpu_sec:.1f} s, {cost.error[:200]}"
    return None if is_right else f"{argument[-60:]}: {seen}"


def test_pickles_of_every_protocol_are_read(tmp_path: Path) -> None:
    from evatool.formats.torch_pickle import read_archive

    value = {
        "x": [1, -70_000, 2**70, 2.5, "t\u00e9", b"b", None, True, False, (1,), (1, 2, 3, 4), {2}, {}],
        3: "y" * 300,
    }
    for protocol in range(6):
        path = bombs.write(tmp_path, "a.pt", bombs.archive(pickle.dumps(value, protocol)))
        if protocol < 3:  # bytes and sets are calls there, which only named functions may be
            value["x"] = [item for item in value["x"] if not isinstance(item, bytes | set)]
            path = bombs.write(tmp_path, "a.pt", bombs.archive(pickle.dumps(value, protocol)))
        assert read_archive(path)[0] == value
