from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from evatool.core.errors import DataError
from evatool.data.eval.eval_set import open_eval_set
from evatool.data.image.eval_transforms import EvalTransform
from evatool.data.prepare.eval_layout import write_eval_set
from evatool.data.tar.writer import Sample

NAMES = ["black-and-white", "coarse-group", "coarse-subgroup", "never-seen", "new-artist", "new-shading", "retrieval"]


def of_image(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def to_tensor(data: bytes) -> Tensor:
    return of_image(Image.open(io.BytesIO(data)))


def test_all_sets_are_made(small: Path) -> None:
    assert sorted(path.name for path in (small / "eval").iterdir()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_loader_and_pictures_agree(small: Path, name: str) -> None:
    opened = open_eval_set(small / "eval" / name, transform=to_tensor, batch_size=8)
    assert (opened.name, opened.kind) == (name, "retrieval" if name == "retrieval" else "classification")
    for _ in range(2):  # a loader can be iterated again
        batches, labels = zip(*opened.loader, strict=True)
        images = torch.cat(list(batches))
        assert len(images) == opened.num_samples > 0
    if opened.kind == "retrieval":
        captions = [c for batch in labels for c in batch]
        assert captions == [[opened.caption(i)] for i in range(opened.num_samples)]
        assert opened.classnames == opened.templates == []
    else:
        targets = torch.cat(list(labels)).tolist()
        assert [opened.classnames[t] for t in targets] == [opened.caption(i) for i in range(opened.num_samples)]
        assert all("{c}" in template for template in opened.templates)
    for i in (0, opened.num_samples - 1):
        assert torch.equal(images[i], of_image(Image.fromarray(opened.image(i))))


@pytest.mark.parity
def test_clip_benchmark_opens_a_set_by_itself(small: Path) -> None:
    from clip_benchmark.datasets.builder import build_dataset

    root = small / "eval" / "new-artist"
    dataset = build_dataset("wds/new-artist", root=str(root), transform=of_image, split="test", download=False)
    opened = open_eval_set(root, transform=to_tensor, batch_size=1000)
    ((images, targets),) = opened.loader
    theirs = list(dataset)
    assert torch.equal(torch.stack([image for image, _ in theirs]), images)
    assert [target for _, target in theirs] == targets.tolist()
    assert (dataset.classes, dataset.templates) == (opened.classnames, opened.templates)
    assert len(dataset.classes) == 25


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('a pickle ran')",)


def write(folder: Path, extra: dict[str, bytes] | None = None, drop: str | None = None) -> Path:
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "PNG")
    samples = [Sample(f"s{i}", "png", png.getvalue(), {"cls": b"0", **(extra or {})}, 192) for i in range(3)]
    if drop:
        samples[1] = Sample("s1", "png", png.getvalue(), {k: v for k, v in samples[1].members.items() if k != drop})
    write_eval_set(folder, samples, kind="classification", classnames=["a"], templates=["{c}"])
    return folder


@pytest.mark.parametrize("extension", ["pyd", "pickle", "pth", "npz", "x.pkl"])
def test_members_that_could_hold_code_are_never_opened(tmp_path: Path, extension: str) -> None:
    folder = write(tmp_path / "set", {extension: pickle.dumps(Bomb())})
    with pytest.raises(DataError, match=f"has a member s0.{extension} that is not read"):
        open_eval_set(folder, transform=to_tensor, batch_size=2)


def shorten_tar(folder: Path) -> None:
    path = folder / "test" / "0.tar"
    with tarfile.open(path) as tar:
        entries = [(entry, tar.extractfile(entry).read()) for entry in tar if not entry.name.startswith("s2")]
    with tarfile.open(path, "w") as tar:
        for entry, data in entries:
            tar.addfile(entry, io.BytesIO(data))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "test" / "nshards.txt").unlink(), "is not an evaluation set"),
        (lambda f: (f / "test" / "nshards.txt").write_text("one"), "does not hold a number"),
        (lambda f: (f / "test" / "nshards.txt").write_text("2"), "lacks test/1.tar"),
        (lambda f: (f / "classnames.txt").unlink(), "lacks classnames.txt"),
        (lambda f: (f / "classnames.txt").write_text("a\n\nb\n"), "line 2 of classnames.txt is empty"),
        (lambda f: (f / "classnames.txt").write_bytes(b"caf\xe9"), "classnames.txt is not UTF-8"),
        (lambda f: (f / "zeroshot_classification_templates.txt").unlink(), "lacks zeroshot"),
        (lambda f: (f / "dataset_type.txt").write_text("multilabel"), "of kind 'multilabel'"),
        (lambda f: (f / "test" / "0.tar").write_bytes(b"x" * 2000), "cannot be read as a tar"),
        (shorten_tar, "has 2 samples instead of the 3 of its manifest"),
    ],
    ids=[
        "no-count",
        "odd-count",
        "too-few-tars",
        "no-names",
        "empty-line",
        "latin-1",
        "no-templates",
        "kind",
        "no-tar",
        "lost-samples",
    ],
)
def test_an_incomplete_set_is_refused(tmp_path: Path, spoil, message: str) -> None:
    folder = write(tmp_path / "set")
    spoil(folder)
    with pytest.raises(DataError, match=message):
        open_eval_set(folder, transform=to_tensor, batch_size=2)


def test_a_sample_without_label_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", {"json": json.dumps({}).encode()}, drop="cls")
    with pytest.raises(DataError, match=r"sample s1 .* has members json, png"):
        open_eval_set(folder, transform=to_tensor, batch_size=2)


def test_masks_of_a_set_on_disk_come_with_its_pictures(tmp_path: Path) -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[:4] = 1
    out = io.BytesIO()
    Image.fromarray(mask).save(out, "PNG")
    folder = write(tmp_path / "set", {"mask.png": out.getvalue()})
    (folder / "dataset_type.txt").write_text("localisation")
    opened = open_eval_set(folder, transform=EvalTransform(4), batch_size=2)
    assert opened.kind == "localisation"
    masks = torch.cat([masks for _, masks in opened.loader])
    assert masks.shape == (3, 4, 4)
    assert masks[0].tolist() == [[1] * 4] * 2 + [[0] * 4] * 2


def test_a_colour_picture_is_no_mask(tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    folder = write(tmp_path / "set", {"mask.png": out.getvalue()})
    (folder / "dataset_type.txt").write_text("localisation")
    with pytest.raises(DataError, match="the mask of s0 has mode RGB"):
        list(open_eval_set(folder, transform=EvalTransform(4), batch_size=2).loader)
