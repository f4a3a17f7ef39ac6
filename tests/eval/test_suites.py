"""Suites as data files, the choice of sets, and finding their folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evatool.core.errors import DataError, RecipeError
from evatool.eval import published
from evatool.eval.published import published_value
from evatool.eval.suite import check_counts, find_set, find_sets, list_suites, load_suite


@pytest.mark.parametrize("name", list_suites())
def test_every_suite_file_is_whole(name: str) -> None:
    suite = load_suite(name)
    names = [s.name for s in suite.sets]
    assert suite.name == name
    assert len(set(names)) == len(names) > 0
    assert sum(s.headline for s in suite.sets) <= 1


def test_the_drawings_are_the_six_sets_and_retrieval() -> None:
    suite = load_suite("drawings")
    expected = ["new-artist", "new-shading", "black-and-white", "never-seen", "coarse-group", "coarse-subgroup"]
    assert [s.name for s in suite.sets] == [*expected, "retrieval"]


def test_an_unknown_suite_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'drawings'"):
        load_suite("drawing")


def test_sets_are_chosen_in_the_order_of_the_suite() -> None:
    suite = load_suite("drawings")
    assert [s.name for s in suite.chosen(["retrieval", "new-artist"])] == ["new-artist", "retrieval"]
    assert suite.chosen(None) == suite.sets


def test_all_unknown_sets_are_named_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        load_suite("drawings").chosen(["new-artists", "zebra", "retrieval"])
    assert len(caught.value.problems) == 2
    assert "did you mean 'new-artist'" in caught.value.problems[0]


def test_an_empty_choice_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"eval\.sets is empty"):
        load_suite("drawings").chosen([])


@pytest.mark.parametrize("below", ["", "eval"], ids=["folder-of-sets", "run-folder"])
def test_sets_are_found_in_their_folder_or_in_a_run_folder(tmp_path: Path, below: str) -> None:
    (tmp_path / below / "new-artist").mkdir(parents=True)
    suite = load_suite("drawings")
    paths = find_sets(tmp_path, suite, suite.sets)
    assert paths["new-artist"] == tmp_path / below / "new-artist"
    assert len(paths) == 7


def test_a_missing_folder_names_the_command_that_makes_it(tmp_path: Path) -> None:
    suite = load_suite("drawings")
    with pytest.raises(DataError, match="no folder") as caught:
        find_sets(tmp_path / "nowhere", suite, suite.sets)
    assert suite.prepare in (caught.value.fix or "")


def test_a_folder_without_any_set_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "holiday").mkdir()
    suite = load_suite("drawings")
    with pytest.raises(DataError, match="none of the evaluation sets") as caught:
        find_sets(tmp_path, suite, suite.sets)
    assert "holiday" in (caught.value.expected or "")


def test_eva27_pins_27_benchmarks_with_their_counts() -> None:
    suite = load_suite("eva27")
    assert len(suite.sets) == 27
    assert all(s.num_samples and s.num_classes and s.metric for s in suite.sets)
    assert suite.partial == "refused"
    assert suite.set("sun397").num_samples == 108_754
    assert suite.set("caltech101").metric == "mean_per_class"
    assert suite.set("cifar10").hub_repo == "clip-benchmark/wds_vtab-cifar10"


@pytest.mark.parametrize("name", [name for name in list_suites() if load_suite(name).partial == "refused"])
def test_counts_that_refuse_a_set_have_a_source(name: str) -> None:
    for entry in load_suite(name).sets:
        assert entry.num_samples, entry.name
        assert entry.source, entry.name


@pytest.mark.parity
def test_eva27_is_what_clip_benchmark_itself_says() -> None:
    """Names, class names and templates of the sets against the package's own tables."""
    from clip_benchmark.datasets import builder, voc2007

    tables = Path(builder.__file__).parent
    names = json.loads((tables / "en_classnames.json").read_text())
    templates = json.loads((tables / "en_zeroshot_classification_templates.json").read_text())
    sets = {entry.name: entry for entry in load_suite("eva27").sets}
    # Food-101 is in DataComp's list alone, Birdsnap in none
    assert {e.name for e in sets.values() if e.wds not in builder.dataset_collection["vtab+"]} == {
        "food101",
        "birdsnap",
    }
    checked = {e.name for e in sets.values() if e.prompts in names}
    assert checked >= {
        "imagenet1k",
        "mnist",
        "caltech101",
        "country211",
        "eurosat",
        "fer2013",
        "flowers",
        "pcam",
        "pets",
    }
    for name in checked:
        assert len(names[sets[name].prompts]) == sets[name].num_classes, name
        assert templates[sets[name].prompts], name
    assert len(builder.all_imagenet_wordnet_ids) == sets["imagenet1k"].num_classes
    assert len(voc2007.object_categories) == sets["voc2007"].num_classes
    retrieval = load_suite("retrieval")
    assert {e.wds for e in retrieval.sets} <= set(builder.dataset_collection["retrieval"])


def test_another_count_is_not_that_benchmark() -> None:
    suite = load_suite("eva27")
    entry = suite.set("imagenet1k")
    counts = {"pictures": 49_999, "classes": 1000, "captions": None}
    with pytest.raises(DataError, match="this is not ImageNet-1K: 49999 of 50000 pictures") as caught:
        check_counts(suite, entry, counts, Path("/data/imagenet1k"), allow_partial=False)
    assert "hf download" in str(caught.value.fix)
    assert check_counts(suite, entry, counts, Path(), allow_partial=True) == "49999 of 50000 pictures"
    assert check_counts(suite, entry, counts | {"pictures": 50_000}, Path(), allow_partial=False) == ""
    drawings = load_suite("drawings")
    assert check_counts(drawings, drawings.sets[0], counts, Path(), allow_partial=False).startswith("49999 of 729")


def test_included_sets_are_the_other_suites_own() -> None:
    assert load_suite("imagenet-robustness").sets == load_suite("eva27").sets[:6]


def test_a_set_is_looked_for_under_all_its_names(tmp_path: Path) -> None:
    entry = load_suite("eva27").set("cifar10")
    assert find_set(tmp_path, entry) == tmp_path / "cifar10"
    (tmp_path / "vtab" / "cifar10").mkdir(parents=True)
    assert find_set(tmp_path, entry) == tmp_path / "vtab" / "cifar10"
    (tmp_path / "cifar10").mkdir()
    assert find_set(tmp_path, entry) == tmp_path / "cifar10"


def test_a_suite_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    head = 'name = "mine"\ntitle = "Mine"\nabout = "x"\nprepare = "make it"\n'
    path.write_text(head + '[include]\nsuite = "drawings"\nsets = ["new-artist", "new-shading"]\n')
    assert [s.name for s in load_suite(str(path)).sets] == ["new-artist", "new-shading"]
    path.write_text(head + '[[averages]]\nname = "a"\ntitle = "A"\nmetric = "top1"\nsets = ["gone"]\n')
    with pytest.raises(RecipeError) as caught:
        load_suite(str(path))
    assert "no evaluation set 'gone'" in caught.value.problems[0]
    path.write_text(head + "colour = 1\n")
    with pytest.raises(RecipeError, match="colour"):
        load_suite(str(path))


def test_published_numbers_are_those_of_the_papers() -> None:
    found = published_value("EVA02-CLIP-B-16", "imagenet1k", "top1", "shortest")
    assert found is not None
    assert (found.value, "openclip_results.csv" in found.source) == (pytest.approx(0.7472), True)
    squash = published_value("EVA02-CLIP-bigE-14-plus", "flickr30k", "text_to_image_recall@1", "squash")
    crop = published_value("EVA02-CLIP-bigE-14-plus", "flickr30k", "text_to_image_recall@1", "shortest")
    assert squash is not None
    assert crop is not None
    assert (squash.value, crop.value) == (pytest.approx(0.797), pytest.approx(0.789))
    average = published_value("EVA-CLIP-18B", "average-27", "average", "shortest")
    assert average is not None
    assert average.value == pytest.approx(0.807)
    assert published_value("EVA02-CLIP-toy", "imagenet1k", "top1", "shortest") is None


def test_every_published_set_is_in_a_suite() -> None:
    known = {s.name for name in list_suites() for s in load_suite(name).sets}
    known |= {a.name for name in list_suites() for a in load_suite(name).averages}
    named = {key.partition("/")[0] for entry in published._table() for key in entry["values"]}
    assert named <= known
