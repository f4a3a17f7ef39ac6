"""A user's folder: what is usable is copied byte for byte, everything else is counted, named, skipped or refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from preparing import prepare
from sample_pictures import BAD_CAUSES, BAD_PICTURES, image

from evatool.core.errors import BadDataLimitError, DataError, EvatoolError, ExitCode, RecipeError
from evatool.data.tar.manifest import ShardIndex

Rows = Sequence[tuple[str, str]]


def write_captions(path: Path, rows: Rows, columns: tuple[str, str] = ("image", "caption"), **how: Any) -> Path:
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)
    else:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        text = "".join(delimiter.join(row) + "\n" for row in [columns, *rows])
    path.write_bytes(text.encode(how.get("encoding", "utf-8")))
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """100 good pictures in two folders."""
    folder = tmp_path / "images"
    (folder / "b").mkdir(parents=True)
    for i in range(50):
        (folder / f"{i}.png").write_bytes(image(seed=i))
        (folder / "b" / f"{i}.jpg").write_bytes(image("JPEG", seed=i))
    return folder


def good_rows() -> list[tuple[str, str]]:
    return [(f"{i}.png", f"drawing {i}") for i in range(50)] + [(f"b/{i}.jpg", f"photo {i}") for i in range(50)]


def run(tmp_path: Path, images: Path, captions: Path, *, resume: bool = False, **options: Any) -> dict[str, Any]:
    shards = {k: options.pop(k) for k in ("max_bad_fraction", "samples_per_shard", "max_pixels") if k in options}
    shards["contact_sheet_images"] = 3
    data = {"kind": "folder", "images": images, "captions": captions, **options}
    prepare(tmp_path / "run", data, shards, resume=resume)
    manifest: dict[str, Any] = json.loads((tmp_path / "run" / "manifest.json").read_text())
    return manifest


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_pictures_are_copied_with_their_captions(tmp_path: Path, images: Path, suffix: str) -> None:
    captions = write_captions(tmp_path / f"captions{suffix}", good_rows())
    manifest = run(tmp_path, images, captions, samples_per_shard=30, license="CC0-1.0")
    index = ShardIndex(tmp_path / "run" / "train")
    found = {}
    for i in range(len(index)):
        members = index.read(i)
        info = json.loads(members["json"])
        picture_bytes = members.get("png") or members["jpg"]
        assert picture_bytes == (images / info["file"]).read_bytes()
        assert info["captions"] == [members["txt"].decode()]
        found[info["file"]] = members["txt"].decode()
    assert found == dict(good_rows())
    assert index.keys != sorted(index.keys)  # shuffled
    assert (manifest["train"]["num_samples"], manifest["train"]["num_shards"]) == (100, 4)
    assert manifest["sources"][0]["license"] == "CC0-1.0"
    assert manifest["recipe"]["data"]["captions"] == str(captions)
    assert manifest["bad_samples"] == {}
    assert (tmp_path / "run" / "contact_sheet.png").stat().st_size > 1000


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_bad_picture_is_skipped_counted_and_named(tmp_path: Path, images: Path, name: str) -> None:
    (images / "bad.png").write_bytes(BAD_PICTURES[name])
    captions = write_captions(tmp_path / "captions.csv", [*good_rows(), ("bad.png", "bad")])
    manifest = run(tmp_path, images, captions)
    assert manifest["bad_samples"] == {BAD_CAUSES[name]: ["bad.png"]}
    assert manifest["train"]["num_samples"] == 100


def test_a_caption_row_nested_without_end_is_a_bad_row(tmp_path: Path, images: Path) -> None:
    captions = write_captions(tmp_path / "captions.jsonl", good_rows())
    with captions.open("a") as file:
        file.write("[" * 100_000 + "\n")
    manifest = run(tmp_path, images, captions)
    assert manifest["bad_samples"] == {"bad-row": ["captions.jsonl line 101"]}


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_file_names_that_are_not_utf8_are_found_or_named(tmp_path: Path, images: Path, encoding: str) -> None:
    raw = os.fsencode(images) + b"/caf\xe9.png"
    os.replace(images / "0.png", raw)
    rows = [("caf\xe9.png" if name == "0.png" else name, caption) for name, caption in good_rows()]
    captions = write_captions(tmp_path / "captions.csv", rows, encoding=encoding)
    manifest = run(tmp_path, images, captions, encoding=encoding, max_bad_fraction=0.05)
    if encoding == "latin-1":  # the list and the names are of one age
        assert manifest["bad_samples"] == {}
        index = ShardIndex(tmp_path / "run" / "train")
        infos = [json.loads(index.read(i)["json"]) for i in range(len(index))]
        assert {"file": "caf\\xe9.png", "captions": ["drawing 0"]} in infos
    else:
        assert manifest["bad_samples"] == {"missing-picture": ["captions.csv line 2"], "no-caption": ["caf\\xe9.png"]}


def test_beyond_the_limit_everything_is_named_and_nothing_is_left(tmp_path: Path, images: Path) -> None:
    for name, data in BAD_PICTURES.items():
        (images / f"{name}.png").write_bytes(data)
    captions = write_captions(tmp_path / "captions.csv", [*good_rows(), *((f"{n}.png", "bad") for n in BAD_PICTURES)])
    with pytest.raises(BadDataLimitError) as caught:
        run(tmp_path, images, captions, max_bad_fraction=0.1)
    message = str(caught.value)
    assert f"{len(BAD_PICTURES)} of {100 + len(BAD_PICTURES)} pictures and caption rows cannot be used" in message
    assert all(f"{name}.png" in message for name in BAD_PICTURES)
    assert "at most 11 (shards.max_bad_fraction = 0.1)" in message
    assert caught.value.exit_code == ExitCode.BAD_DATA
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {
        "resolved.toml",
        "environment.json",
        "status.json",
        "logs",
    }
    assert json.loads((tmp_path / "run" / "status.json").read_text())["exit_code"] == 78
    # The folder may be used again, with a limit that lets them pass.
    manifest = run(tmp_path, images, captions, max_bad_fraction=0.2)
    assert sum(map(len, manifest["bad_samples"].values())) == len(BAD_PICTURES)


def test_the_limit_itself_is_allowed(tmp_path: Path, images: Path) -> None:
    (images / "0.png").write_bytes(b"")
    captions = write_captions(tmp_path / "captions.csv", good_rows())
    assert run(tmp_path, images, captions, max_bad_fraction=0.01)["train"]["num_samples"] == 99


BAD_ROWS: dict[str, tuple[bytes, dict[str, list[str]]]] = {
    "missing": (b"nowhere.png,words\n", {"missing-picture": ["captions.csv line 102"]}),
    "empty-caption": (b"0.png,   \n", {"empty-caption": ["captions.csv line 102"]}),
    "no-caption-cell": (b"0.png\n", {"bad-row": ["captions.csv line 102"]}),
    "unquoted-comma": (b"0.png,a cat, sleeping\n", {"bad-row": ["captions.csv line 102"]}),
    "latin-1": (b"0.png,caf\xe9\n", {"undecodable-text": ["captions.csv line 102"]}),
    "parent": (b"../secret.png,words\n", {"outside-folder": ["captions.csv line 102"]}),
    "hidden-parent": (b"b/../../secret.png,words\n", {"outside-folder": ["captions.csv line 102"]}),
    "absolute": (b"/etc/passwd,words\n", {"outside-folder": ["captions.csv line 102"]}),
    "null": (b"a\0b.png,words\n", {"missing-picture": ["captions.csv line 102"]}),
    "folder": (b"b,words\n", {"missing-picture": ["captions.csv line 102"]}),
    "no-name": (b",words\n", {"bad-row": ["captions.csv line 102"]}),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_skipped_counted_and_named(tmp_path: Path, images: Path, name: str) -> None:
    (tmp_path / "secret.png").write_bytes(image())
    captions = write_captions(tmp_path / "captions.csv", good_rows())
    line, expected = BAD_ROWS[name]
    with captions.open("ab") as file:
        file.write(line)
    manifest = run(tmp_path, images, captions)
    assert manifest["bad_samples"] == expected
    assert manifest["train"]["num_samples"] == 100


def test_bad_json_rows(tmp_path: Path, images: Path) -> None:
    captions = write_captions(tmp_path / "captions.jsonl", good_rows())
    with captions.open("a") as file:
        file.write('{"image": "0.png", \n[1]\n{"image": "0.png", "caption": 3}\n\n')
    manifest = run(tmp_path, images, captions, max_bad_fraction=0.05)
    assert manifest["bad_samples"] == {"bad-row": [f"captions.jsonl line {n}" for n in (101, 102, 103)]}


def test_pictures_without_captions_are_named(tmp_path: Path, images: Path) -> None:
    (images / "notes.txt").write_text("not a picture, not counted")
    captions = write_captions(tmp_path / "captions.csv", good_rows()[1:])
    assert run(tmp_path, images, captions)["bad_samples"] == {"no-caption": ["0.png"]}


def test_several_rows_give_a_picture_several_captions(tmp_path: Path, images: Path) -> None:
    rows = [*good_rows(), ("0.png", "second"), ("./0.png", "third"), ("0.png", "second")]
    manifest = run(tmp_path, images, write_captions(tmp_path / "captions.csv", rows))
    assert manifest["train"]["num_samples"] == 100
    index = ShardIndex(tmp_path / "run" / "train")
    infos = [json.loads(index.read(i)["json"]) for i in range(len(index))]
    assert next(i["captions"] for i in infos if i["file"] == "0.png") == ["drawing 0", "second", "third"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_captions_in_other_encodings(tmp_path: Path, images: Path, encoding: str) -> None:
    rows = [("0.png", "größe"), *good_rows()[1:]]
    captions = write_captions(tmp_path / "captions.csv", rows, encoding=encoding)
    declared = "utf-8" if encoding == "utf-8-sig" else encoding
    run(tmp_path, images, captions, encoding=declared)
    index = ShardIndex(tmp_path / "run" / "train")
    assert "größe" in {index.read(i)["txt"].decode() for i in range(len(index))}


def no_column(images: Path, captions: Path) -> None:
    write_captions(captions, good_rows(), columns=("image", "captions"))


def no_json_column(images: Path, captions: Path) -> None:
    write_captions(captions, good_rows(), columns=("file", "caption"))


def utf16(images: Path, captions: Path) -> None:
    write_captions(captions, good_rows(), encoding="utf-16")


def no_pictures(images: Path, captions: Path) -> None:
    for path in images.rglob("*.*"):
        path.unlink()


def no_folder(images: Path, captions: Path) -> None:
    images.rename(images.with_name("elsewhere"))


def folder_is_a_file(images: Path, captions: Path) -> None:
    no_folder(images, captions)
    images.write_text("")


WHOLE_FILE_PROBLEMS: dict[str, tuple[str, Callable[[Path, Path], object], list[str]]] = {
    "missing-column": ("captions.csv", no_column, ["no column 'caption'", "--set data.caption_column=captions"]),
    "missing-json-key": ("captions.jsonl", no_json_column, ["no column 'image'", "the file has file, caption"]),
    "other-encoding": ("captions.csv", utf16, ["is not utf-8", "--set data.encoding=utf-16"]),
    "empty-file": ("captions.csv", lambda _, c: c.write_bytes(b""), ["is empty"]),
    "header-only": ("captions.csv", lambda _, c: c.write_bytes(b"image,caption\n"), ["has no rows"]),
    "no-file": ("captions.csv", lambda _, c: c.unlink(), ["there is no caption file"]),
    "other-kind": ("captions.xlsx", lambda *_: None, ["suffix '.xlsx'", ".csv, .tsv, .jsonl"]),
    "open-quote": ("captions.csv", lambda _, c: c.write_bytes(b'image,caption\n0.png,"' + b"x" * 200_000), ["field"]),
    "empty-folder": ("captions.csv", no_pictures, ["has no pictures in it"]),
    "missing-folder": ("captions.csv", no_folder, ["does not exist"]),
    "folder-is-a-file": ("captions.csv", folder_is_a_file, ["is not a folder"]),
}


@pytest.mark.parametrize("name", WHOLE_FILE_PROBLEMS)
def test_what_concerns_the_whole_source_is_one_clear_error(tmp_path: Path, images: Path, name: str) -> None:
    file, spoil, expected = WHOLE_FILE_PROBLEMS[name]
    captions = write_captions(tmp_path / file, good_rows())
    spoil(images, captions)
    with pytest.raises(DataError) as caught:
        run(tmp_path, images, captions)
    assert not isinstance(caught.value, BadDataLimitError)
    assert all(part in str(caught.value) for part in expected), str(caught.value)
    assert not (tmp_path / "run" / "train").exists()
    assert not (tmp_path / "run" / ".partial").exists()


def test_an_unknown_encoding_is_a_recipe_error(tmp_path: Path) -> None:
    from evatool.recipe.load import resolve_table

    data = {"kind": "folder", "images": "i", "captions": "c.csv", "encoding": "utf-9"}
    with pytest.raises(RecipeError, match="unknown text encoding 'utf-9'"):
        resolve_table({"data": data}, "data-prepare")


def test_all_bad_is_refused_even_without_a_limit(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    captions = write_captions(tmp_path / "captions.csv", [("a.png", "words")])
    with pytest.raises(EvatoolError, match="no picture is left to train on"):
        run(tmp_path, tmp_path / "images", captions, max_bad_fraction=1.0)
