"""Image folders and Birdsnap as evaluation sets, and what is wrong with them in words."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evatool.core.errors import DataError
from evatool.data.eval.eval_set import EvalSet, open_eval_set
from evatool.data.image.eval_transforms import EvalTransform


def jpeg(shade: int, size: tuple[int, int] = (40, 30)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (shade, 255 - shade, 0)).save(out, "JPEG")
    return out.getvalue()


def fill(root: Path, classes: dict[str, int]) -> Path:
    for number, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i}.JPEG").write_bytes(jpeg(40 * number + i))
    return root


def opened(folder: Path, **extra: object) -> EvalSet:
    return open_eval_set(folder, transform=EvalTransform(16), batch_size=2, **extra)  # type: ignore[arg-type]


def test_folders_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    root = fill(tmp_path / "digits", {"b_two": 1, "a_one": 2})
    (root / "zeroshot_classification_templates.txt").write_text("a photo of {c}\n")
    found = opened(root)
    assert (found.classnames, found.templates) == (["a one", "b two"], ["a photo of {c}"])
    assert torch.cat([labels for _, labels in found.loader]).tolist() == [0, 0, 1]
    assert found.samples.keys == ["a_one/0.JPEG", "a_one/1.JPEG", "b_two/0.JPEG"]
    assert found.samples.label(2) == 1


def test_a_split_below_the_folder_and_clip_benchmarks_own_names(tmp_path: Path) -> None:
    fill(tmp_path / "mnist" / "test", {str(i): 1 for i in range(10)})
    found = opened(tmp_path / "mnist", prompts="mnist")
    assert found.classnames == [str(i) for i in range(10)]
    assert found.templates == ['a photo of the number: "{c}".']


@pytest.mark.parity
def test_folders_with_wordnet_ids_get_imagenets_names(tmp_path: Path) -> None:
    from clip_benchmark.datasets.builder import all_imagenet_wordnet_ids

    fill(tmp_path / "imagenet-a", {"n01498041": 1, "n12267677": 2})
    found = opened(tmp_path / "imagenet-a", prompts="imagenet1k")
    assert found.classnames == ["stingray", "acorn"]
    assert len(found.templates) == 80
    assert len(all_imagenet_wordnet_ids) == 1000


def test_names_that_do_not_match_the_folders_are_refused(tmp_path: Path) -> None:
    root = fill(tmp_path / "s", {"a": 1, "b": 1})
    (root / "classnames.txt").write_text("only one\n")
    with pytest.raises(DataError, match="2 of 2 folders are none of the 1 class names") as caught:
        opened(root)
    assert "folder<TAB>name" in str(caught.value.fix)


def test_folders_without_templates_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="clip-benchmark knows none for 'toys'"):
        opened(fill(tmp_path / "toys", {"a": 1}))


def test_an_empty_folder_is_no_set(tmp_path: Path) -> None:
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="is not an evaluation set"):
        opened(tmp_path / "empty")


def birdsnap(root: Path) -> Path:
    fill(root / "images", {"Blue_Jay": 2, "Acadian_Flycatcher": 2})
    rows = [
        "id\tcommon\tscientific\tdir",
        "2\tBlue Jay\tC. cristata\tBlue_Jay",
        "1\tAcadian Flycatcher\tE. v.\tAcadian_Flycatcher",
    ]
    (root / "species.txt").write_text("\n".join(rows))
    (root / "test_images.txt").write_text("path\nBlue_Jay/1.JPEG\nAcadian_Flycatcher/0.JPEG\nBlue_Jay/gone.JPEG\n")
    return root


def test_birdsnap_is_read_with_the_pictures_that_are_there(tmp_path: Path) -> None:
    found = opened(birdsnap(tmp_path / "birdsnap"))
    assert found.classnames == ["Acadian Flycatcher", "Blue Jay"]
    assert found.templates == ["a photo of a {c}, a type of bird."]
    assert found.samples.keys == ["Blue_Jay/1.JPEG", "Acadian_Flycatcher/0.JPEG"]
    assert torch.cat([labels for _, labels in found.loader]).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("species.txt", "id\tname\n1\tx", "lacks the column common, dir"),
        ("test_images.txt", "path\nDodo/1.JPEG", "belongs to no species"),
        ("test_images.txt", "path\nBlue_Jay/gone.JPEG", "none of the test pictures"),
    ],
    ids=["columns", "unknown-species", "nothing-there"],
)
def test_a_broken_birdsnap_is_refused(tmp_path: Path, file: str, content: str, says: str) -> None:
    root = birdsnap(tmp_path / "birdsnap")
    (root / file).write_text(content)
    with pytest.raises(DataError, match=says):
        opened(root)


@pytest.mark.parametrize("content", [b"", b"no picture", jpeg(3)[:300]], ids=["empty", "text", "cut-off"])
def test_a_corrupt_picture_is_named_and_never_left_out(tmp_path: Path, content: bytes) -> None:
    root = fill(tmp_path / "s", {"a": 3})
    (root / "zeroshot_classification_templates.txt").write_text("{c}")
    (root / "a" / "1.JPEG").write_bytes(content)
    with pytest.raises(DataError, match=r"picture a/1\.JPEG of evaluation set s cannot be used") as caught:
        list(opened(root).loader)
    assert caught.value.where == str(root / "a" / "1.JPEG")


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_every_sample_is_on_exactly_one_rank(tmp_path: Path, world_size: int, batch_size: int) -> None:
    root = fill(tmp_path / "s", {"a": 4, "b": 3})
    (root / "zeroshot_classification_templates.txt").write_text("{c}")
    loaders = [
        open_eval_set(root, transform=EvalTransform(8), batch_size=batch_size, rank=r, world_size=world_size).loader
        for r in range(world_size)
    ]
    assert sorted(np.concatenate([loader.indices for loader in loaders]).tolist()) == list(range(7))
    assert max(map(len, loaders)) == loaders[0].most_batches
    for loader in loaders:
        assert sum(len(labels) for _, labels in loader) == len(loader.indices)


@pytest.mark.parity
@pytest.mark.parametrize("resize", ["shortest", "squash"])
def test_pictures_are_those_of_open_clips_transform(resize: str) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    reference = image_transform_v2(PreprocessCfg(size=32, resize_mode=resize, mean=(0, 0, 0), std=(1, 1, 1)), False)
    rng = np.random.default_rng(0)
    for shape in ((50, 71, 3), (71, 50, 3), (32, 32, 3), (33, 120, 3)):
        out = io.BytesIO()
        image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        image.save(out, "PNG")
        theirs = (reference(image) * 255).round().to(torch.uint8)
        assert torch.equal(EvalTransform(32, resize)(out.getvalue()), theirs)  # type: ignore[arg-type]


def odd_picture(mode: str) -> tuple[str, bytes]:
    """Name and bytes of a picture that training shards would refuse."""
    values = np.random.default_rng(0).integers(0, 256, (30, 40, 4), dtype=np.uint8)
    out = io.BytesIO()
    if mode == "CMYK":
        Image.fromarray(values, "CMYK").save(out, "JPEG")
        return "0.jpg", out.getvalue()
    Image.fromarray(values[..., 0].astype(np.uint16) * 257).save(out, "PNG")
    return "0.png", out.getvalue()


@pytest.mark.parity
@pytest.mark.parametrize("mode", ["CMYK", "16-bit"])
def test_odd_pictures_are_converted_as_clip_benchmark_does_and_can_be_shown(tmp_path: Path, mode: str) -> None:
    """clip-benchmark's folders are torchvision's: `Image.convert("RGB")`, then open_clip's transform."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    name, data = odd_picture(mode)
    folder = fill(tmp_path / "set", {"cat": 0})
    (folder / "cat" / name).write_bytes(data)
    (folder / "zeroshot_classification_templates.txt").write_text("{c}")
    found = opened(folder)
    reference = image_transform_v2(PreprocessCfg(size=16, mean=(0, 0, 0), std=(1, 1, 1)), False)
    with Image.open(io.BytesIO(data)) as image:
        expected = image.convert("RGB")
        theirs = (reference(expected) * 255).round().to(torch.uint8)
    assert torch.equal(next(iter(found.loader))[0][0], theirs)
    assert np.array_equal(found.image(0), np.asarray(expected))
