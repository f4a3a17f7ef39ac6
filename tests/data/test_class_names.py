"""Folders of images get their own class's name, or are refused: never the name at their place in a sorted list."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from evatool.core.errors import DataError
from evatool.data.eval.class_names import classes_of, imagenet_names, packaged
from tests.data.test_eval_folders import fill, opened

SHAPES = ["Round thing", "angular-thing", "Zig-Zag"]


def names_of(folder: Path, folders: Iterable[str], prompts: str = "own") -> dict[str, str]:
    """The class name that each folder gets."""
    found = classes_of(folder, sorted(folders), prompts)
    return {name: found.names[number] for name, number in found.number_of.items()}


def listed(folder: Path, lines: list[str]) -> Path:
    (folder / "classnames.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("width", [1, 5])
def test_numbered_folders_follow_the_numbers(first: int, width: int, tmp_path: Path) -> None:
    names = [f"thing {i}a" for i in range(12)]
    folders = {f"{i + first:0{width}d}": name for i, name in enumerate(names)}
    assert names_of(listed(tmp_path, names), folders) == folders


def test_imagenet_v2_as_its_archive_unpacks(tmp_path: Path) -> None:
    names = packaged("classnames")["imagenet1k"]
    found = names_of(tmp_path, map(str, range(1000)), "imagenetv2")
    assert found == {str(i): name for i, name in enumerate(names)}
    assert found["10"] == names[10]


def test_flowers_and_traffic_signs_as_released(tmp_path: Path) -> None:
    flowers, signs = packaged("classnames")["flowers"], packaged("classnames")["gtsrb"]
    assert names_of(tmp_path, (str(i) for i in range(1, 103)), "flowers") == {
        str(i + 1): name for i, name in enumerate(flowers)
    }
    assert names_of(tmp_path, (f"{i:05d}" for i in range(43)), "gtsrb")["00010"] == signs[10]


def test_wordnet_ids_of_all_classes_or_of_some(tmp_path: Path) -> None:
    assert names_of(tmp_path, ["n12267677", "n01498041"], "imagenet-a") == {
        "n01498041": "stingray",
        "n12267677": "acorn",
    }
    ids = list(imagenet_names())
    listed(tmp_path, list(imagenet_names().values()))
    assert names_of(tmp_path, ids)[ids[7]] == imagenet_names()[ids[7]]


@pytest.mark.parametrize(
    "folders",
    [
        ["angular_thing", "round_thing", "zig_zag"],
        ["ANGULAR THING", "Round-Thing", "ZigZag"],
        ["003.Zig Zag", "001.Round_thing", "002.angular_thing"],
        ["zig_zag"],
    ],
    ids=["underscores", "capitals", "numbered names", "a part"],
)
def test_released_spellings_are_the_same_name(folders: list[str], tmp_path: Path) -> None:
    found = names_of(listed(tmp_path, SHAPES), folders)
    for folder, name in found.items():
        assert name.lower()[:3] in folder.lower()


def test_releases_with_other_words(tmp_path: Path) -> None:
    assert names_of(tmp_path, ["SeaLake", "Highway"], "eurosat") == {
        "SeaLake": "lake or sea",
        "Highway": "highway or road",
    }


def test_a_table_of_folders(tmp_path: Path) -> None:
    table = listed(tmp_path, ["b7\ta red thing", "a1\ta blue thing", "c3\tnot here"])
    found = classes_of(table, ["a1", "b7"], "own")
    assert found.names == ["a red thing", "a blue thing", "not here"]
    assert found.number_of == {"a1": 1, "b7": 0}


@pytest.mark.parametrize(
    ("lines", "folders", "said"),
    [
        (["one", "two"], ["b", "a"], "2 of 2 folders are none of the 2 class names: a"),
        (["one", "two", "three"], ["1", "2"], "2 of 2 folders are none"),
        (["one", "two"], ["3", "4"], "2 of 2 folders are none"),
        (["a b", "a-b"], ["a_b"], "several folders are the same class, or a folder is several"),
        (["a\tx"], ["a", "b"], "has no line for b"),
        (["a\tx", "a\ty"], ["a"], "names a twice"),
        (["a\tx", "b"], ["a", "b"], "line 2 of classnames.txt is not a folder, a tab and a name"),
        (["stingray", "acorn"], ["n12267677", "n02123045"], "none of the 2 class names"),
    ],
)
def test_what_does_not_match_is_refused(lines: list[str], folders: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        names_of(listed(tmp_path, lines), folders)


def test_numbers_without_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing names them"):
        names_of(tmp_path, ["0", "1"])


def test_hidden_folders_are_no_classes_and_all_suffixes_are_read_or_refused(tmp_path: Path) -> None:
    root = fill(tmp_path / "s", {"a": 1, "b": 1, "__MACOSX": 1, ".cache": 1})
    (root / "zeroshot_classification_templates.txt").write_text("{c}\n")
    next((root / "a").iterdir()).rename(root / "a" / "0.TIF")
    (root / "a" / "._0.TIF").write_bytes(b"of macOS")
    found = opened(root)
    assert found.classnames == ["a", "b"]
    assert found.samples.keys[0] == "a/0.TIF"
    (root / "b" / "phone.HEIC").write_bytes(b"...")
    with pytest.raises(DataError, match=r"1 images of b are of a format that is not read: phone\.HEIC"):
        opened(root)
