"""Nothing that is evaluated on is trained on, proven from the written shards and not from the code that splits."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

HELD_OUT_SETS = {"twemoji", "fluent-3d", "fluent-emoji-high-contrast", "emojione-monotone"}
EVAL_SETS = {
    "new-artist": {"twemoji"},
    "new-shading": {"fluent-3d"},
    "black-and-white": {"fluent-emoji-high-contrast", "emojione-monotone"},
    "never-seen": {"twemoji"},
    "coarse-group": {"twemoji"},
    "coarse-subgroup": {"twemoji"},
    "retrieval": {"twemoji"},
}


def read_samples(folder: Path) -> Iterator[dict[str, bytes]]:
    """Members of every sample by extension, read with the standard library alone."""
    for path in sorted(folder.glob("*.tar")):
        samples: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for entry in tar:
                key, _, extension = entry.name.partition(".")
                content = tar.extractfile(entry)
                assert content is not None
                samples.setdefault(key, {"__key__": key.encode()})[extension] = content.read()
        yield from samples.values()


def pixel_digest(png: bytes) -> str:
    return hashlib.sha256(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).tobytes()).hexdigest()


@pytest.fixture(scope="module")
def train(prepared: Path) -> list[dict[str, bytes]]:
    return list(read_samples(prepared / "train"))


@pytest.fixture(scope="module")
def evaluated(prepared: Path) -> dict[str, list[dict[str, bytes]]]:
    return {name: list(read_samples(prepared / "eval" / name / "test")) for name in EVAL_SETS}


@pytest.fixture(scope="module")
def tile_owner() -> dict[str, tuple[str, str]]:
    """Digest of every bundled picture -> (set, label), cut from the sprite sheets without the package's code."""
    folder = resources.files("evatool.data") / "drawings"
    rows = [json.loads(line) for line in gzip.decompress((folder / "concepts.jsonl.gz").read_bytes()).splitlines()]
    sheets: dict[str, Image.Image] = {}
    owner = {}
    for row in rows:
        for name, i in row["tiles"]:
            if name not in sheets:
                sheets[name] = Image.open(io.BytesIO((folder / f"{name}.webp").read_bytes())).convert("RGB")
            left, top = 64 * (i % 32), 64 * (i // 32)
            tile = sheets[name].crop((left, top, left + 64, top + 64))
            owner[hashlib.sha256(np.asarray(tile).tobytes()).hexdigest()] = (name, row["label"])
    return owner


def never_seen(evaluated: dict[str, list[dict[str, bytes]]]) -> set[str]:
    return {json.loads(sample["json"])["label"] for sample in evaluated["never-seen"]}


def test_training_pictures_are_of_no_held_out_artist(train, tile_owner) -> None:
    sets = {tile_owner[pixel_digest(sample["png"])][0] for sample in train}
    assert sets == {"noto", "noto-v1", "fxemoji", "fluent-emoji-flat", "emojione", "streamline-emojis"}
    assert not sets & HELD_OUT_SETS


def test_training_has_no_never_seen_concept(train, evaluated, tile_owner) -> None:
    unseen = never_seen(evaluated)
    assert len(unseen) == 120
    assert not {tile_owner[pixel_digest(sample["png"])][1] for sample in train} & unseen
    captions = [c for sample in train for c in [sample["txt"].decode(), *json.loads(sample["json"])["captions"]]]
    parts = {part.strip() for caption in captions for part in caption.split(",")}
    assert not parts & unseen


def test_no_training_picture_is_an_evaluation_picture(train, evaluated) -> None:
    trained_pixels = {pixel_digest(sample["png"]) for sample in train}
    trained_files = {sample["png"] for sample in train}
    for name, samples in evaluated.items():
        assert not trained_pixels & {pixel_digest(sample["png"]) for sample in samples}, name
        assert not trained_files & {sample["png"] for sample in samples}, name


def test_training_captions_name_what_is_drawn(train, tile_owner) -> None:
    for sample in train:
        label = tile_owner[pixel_digest(sample["png"])][1]
        info = json.loads(sample["json"])
        assert (sample["txt"].decode(), info["label"]) == (label, label)
        assert all(label in caption for caption in info["captions"])


@pytest.mark.parametrize("name", EVAL_SETS)
def test_evaluation_sets_hold_what_they_say(name: str, evaluated, tile_owner, prepared: Path) -> None:
    unseen = never_seen(evaluated)
    classes = prepared / "eval" / name / "classnames.txt"
    names = classes.read_text().splitlines() if classes.exists() else []
    for sample in evaluated[name]:
        owner, label = tile_owner[pixel_digest(sample["png"])]
        assert owner in EVAL_SETS[name]
        assert (label in unseen) == (name == "never-seen")
        if name == "retrieval":
            assert sample["txt"].decode() == label
        elif not name.startswith("coarse"):
            assert names[int(sample["cls"])] == label
    if name == "coarse-group":
        assert len(names) == 5
    elif name == "coarse-subgroup":
        assert len(names) <= 49


def test_counts(train, evaluated) -> None:
    counts = {name: len(samples) for name, samples in evaluated.items()}
    assert counts["new-artist"] == counts["new-shading"] == counts["retrieval"] == 849 - 120
    assert counts["never-seen"] == 120
    assert len(train) == 3137  # 3,619 pictures of six sets, less those of the 120 concepts


def test_split_is_fixed(evaluated) -> None:
    digest = hashlib.sha256("\n".join(sorted(never_seen(evaluated))).encode()).hexdigest()
    assert digest[:16] == "fb9b7e5ecdf22369"
