"""The stage on real drawings with random weights: what it leaves behind, and what a broken set does not take along."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from evatool.core.errors import CheckpointError, DataError, EvatoolError, ExitCode, RecipeError, UsageError
from evatool.eval import result_rows
from evatool.eval.report.gallery import read_gallery
from evatool.eval.results import EvalResults, read_results
from evatool.recipe.schema import (
    DataPrepareRecipe,
    DrawingsSource,
    EvalRecipe,
    EvalSection,
    FewShotSection,
    LinearProbeSection,
)
from evatool.runs.result import Result
from evatool.runs.run_dir import RunOptions
from evatool.stages import data_prepare
from evatool.stages import eval as eval_stage

TOY = "EVA02-CLIP-toy-small"


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of data-prepare for 24 concepts, 6 of them never seen."""
    folder = tmp_path_factory.mktemp("drawings") / "run"
    recipe = DataPrepareRecipe(data=DrawingsSource(max_concepts=24, num_unseen=6))
    data_prepare.run(recipe, RunOptions(name="test", run_dir=folder))
    return folder


def run(data: Path, run_dir: Path, **changes: object) -> Result:
    settings = {"models": {"a model": TOY}, "data": data, "num_bootstrap": 50, "use_cache": False, "num_threads": 1}
    section = EvalSection(**{**settings, **changes})  # type: ignore[arg-type]
    return eval_stage.run(EvalRecipe(eval=section), RunOptions(name="test", run_dir=run_dir))


@pytest.fixture(scope="module")
def evaluated(drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, EvalResults]:
    """Two models of the same random weights on all sets."""
    result = run(drawings, tmp_path_factory.mktemp("eval") / "run", models={"a model": TOY, "its twin": TOY})
    return result, read_results(result.outputs["results"])


def test_every_set_has_its_metrics_for_every_model(evaluated: tuple[Result, EvalResults]) -> None:
    _, results = evaluated
    assert [s.name for s in results.sets] == [
        *("new-artist", "new-shading", "black-and-white", "never-seen", "coarse-group", "coarse-subgroup", "retrieval")
    ]
    for record in results.sets:
        expected = 7 if record.kind == "retrieval" else 2 if (record.num_classes or 0) > 5 else 1
        expected += record.name in ("black-and-white", "coarse-group", "coarse-subgroup")  # several pictures a class
        for model in ("a model", "its twin"):
            rows = [r for r in results.results if (r.model, r.set) == (model, record.name)]
            assert len(rows) == expected
            assert all(r.low <= r.value <= r.high and r.n > 0 and r.fingerprint for r in rows)
    assert results.failures == []
    assert set(results.versions) >= {"evatool", "torch", "clip-benchmark"}


def test_a_part_of_the_full_set_does_not_carry_its_name_alone(evaluated: tuple[Result, EvalResults]) -> None:
    record = evaluated[1].sets[0]
    assert record.variant == "drawings/new-artist (18 of 729 pictures, 18 of 729 classes)"


def test_equal_models_do_not_differ(evaluated: tuple[Result, EvalResults]) -> None:
    _, results = evaluated
    first, second = ([(r.set, r.metric, r.value) for r in results.results if r.model == m.name] for m in results.models)
    assert first == second
    assert len(results.differences) == len(first)
    assert all(d.value == 0 and not d.interval.excludes_zero for d in results.differences)


def test_kept_predictions_give_the_numbers_back(evaluated: tuple[Result, EvalResults]) -> None:
    result, results = evaluated
    for record in results.sets:
        with np.load(result.outputs["predictions"] / "a_model" / f"{record.name}.npz", allow_pickle=False) as kept:
            if record.kind == "classification":
                again = {"top1": (kept["top"][:, 0] == kept["labels"]).mean()}
            else:
                again = {f"{d}_recall@5": (kept[d] < 5).mean() for d in ("text_to_image", "image_to_text")}
        for metric, value in again.items():
            row = results.row("a model", record.name, metric)
            assert row is not None
            assert row.value == pytest.approx(value)


def test_the_report_the_gallery_and_the_table_are_made(evaluated: tuple[Result, EvalResults]) -> None:
    result, _ = evaluated
    assert result.outputs["report"].stat().st_size > 10_000
    gallery = read_gallery(result.outputs["gallery"])
    assert gallery.model == "its twin"
    assert gallery.worst
    assert all(r.query.caption for r in gallery.worst if r.direction == "text_to_image")
    assert result.table[0] == ["set", "metric", "a model", "its twin", "chance", "n"]
    assert "eval/its twin/new-artist/top1" in result.metrics


def test_the_same_seed_gives_the_same_numbers(drawings: Path, tmp_path: Path) -> None:
    def values(name: str) -> list:
        rows = read_results(run(drawings, tmp_path / name, sets=["new-artist"]).outputs["results"]).results
        return [(r.metric, r.value, r.low, r.high) for r in rows]

    assert values("one") == values("two")


def broken_copy(drawings: Path, folder: Path) -> Path:
    shutil.copytree(drawings / "eval", folder)
    (folder / "new-artist" / "classnames.txt").write_text("only one class")
    (folder / "never-seen" / "zeroshot_classification_templates.txt").unlink()
    shutil.rmtree(folder / "coarse-group")
    return folder


def test_broken_sets_are_named_and_do_not_lose_the_others(drawings: Path, tmp_path: Path) -> None:
    with pytest.raises(EvatoolError) as caught:
        run(broken_copy(drawings, tmp_path / "sets"), tmp_path / "run")
    assert caught.value.exit_code == ExitCode.FAILED
    for name in ("new-artist", "never-seen", "coarse-group"):
        assert name in caught.value.what
    assert "out of range" in caught.value.what
    results = read_results(tmp_path / "run" / "results.json")
    assert [s.name for s in results.sets] == ["new-shading", "black-and-white", "coarse-subgroup", "retrieval"]
    assert {f.set for f in results.failures} == {"new-artist", "never-seen", "coarse-group"}
    assert "Not evaluated" in (tmp_path / "run" / "report.html").read_text()


def test_a_set_of_another_kind_is_refused(drawings: Path, tmp_path: Path) -> None:
    shutil.copytree(drawings / "eval" / "retrieval", tmp_path / "sets" / "new-artist")
    with pytest.raises(EvatoolError, match="is a retrieval set"):
        run(tmp_path / "sets", tmp_path / "run", sets=["new-artist"])
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_model_that_cannot_be_loaded_does_not_lose_the_others(drawings: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    models = {"gone": str(tmp_path / "empty"), "here": TOY}
    with pytest.raises(EvatoolError, match="model gone"):
        run(drawings, tmp_path / "run", models=models, sets=["new-artist"])
    results = read_results(tmp_path / "run" / "results.json")
    assert [m.name for m in results.models] == ["here"]
    assert [(f.model, f.set) for f in results.failures] == [("gone", None)]


def test_the_only_model_keeps_its_own_error(drawings: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError):
        run(drawings, tmp_path / "run", models={"gone": str(tmp_path / "empty")})


def test_a_missing_data_folder_is_named_before_a_run_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder"):
        run(tmp_path / "nowhere", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_models_that_would_share_a_folder_are_refused(drawings: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        run(drawings, tmp_path / "run", models={"a b": TOY, "a_B": TOY})
    assert "'a b' and 'a_B'" in caught.value.problems[0]


def test_results_of_an_earlier_start_do_not_survive_a_failure(drawings: Path, tmp_path: Path) -> None:
    data = tmp_path / "sets"
    shutil.copytree(drawings / "eval" / "new-artist", data / "new-artist")
    options = RunOptions(name="test", run_dir=tmp_path / "run")
    recipe = EvalRecipe(eval=EvalSection(models={"m": TOY}, data=data, sets=["new-artist"], num_bootstrap=50))
    eval_stage.run(recipe, options)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["failures"] == []
    (data / "new-artist" / "test" / "0.tar").write_bytes(b"")
    options.resume = True
    with pytest.raises(EvatoolError):
        eval_stage.run(recipe, options)
    assert not (tmp_path / "run" / "results.json").exists()
    assert not (tmp_path / "run" / "report.html").exists()


def kept_times(run_dir: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in (run_dir / "predictions").rglob("*.npz")}


def test_a_resumed_run_evaluates_only_what_is_missing(drawings: Path, tmp_path: Path) -> None:
    data = tmp_path / "sets"
    for name in ("new-artist", "never-seen", "retrieval"):
        shutil.copytree(drawings / "eval" / name, data / name)
    (data / "never-seen" / "classnames.txt").rename(tmp_path / "names")
    section = {
        "models": {"m": TOY},
        "data": data,
        "sets": ["new-artist", "never-seen", "retrieval"],
        "num_bootstrap": 50,
    }
    recipe = EvalRecipe(eval=EvalSection(**section, use_cache=False))  # type: ignore[arg-type]
    options = RunOptions(name="test", run_dir=tmp_path / "run")
    with pytest.raises(EvatoolError, match="never-seen"):
        eval_stage.run(recipe, options)
    before = read_results(tmp_path / "run" / "results.json")
    times = kept_times(tmp_path / "run")
    assert set(times) == {"new-artist.npz", "retrieval.npz"}
    (tmp_path / "names").rename(data / "never-seen" / "classnames.txt")
    options.resume = True
    result = eval_stage.run(recipe, options)
    after = read_results(result.outputs["results"])
    assert {name: t for name, t in kept_times(tmp_path / "run").items() if name in times} == times
    assert [r for r in after.results if r.set != "never-seen"] == before.results
    assert after.failures == []
    assert "retrieval" in read_gallery(result.outputs["gallery"]).set


def test_a_set_that_was_written_since_is_evaluated_again(drawings: Path, tmp_path: Path) -> None:
    data = tmp_path / "sets"
    shutil.copytree(drawings / "eval" / "new-artist", data / "new-artist")
    recipe = EvalRecipe(
        eval=EvalSection(models={"m": TOY}, data=data, sets=["new-artist"], num_bootstrap=50, use_cache=False)
    )
    options = RunOptions(name="test", run_dir=tmp_path / "run")
    eval_stage.run(recipe, options)
    times = kept_times(tmp_path / "run")
    shutil.copy(data / "new-artist" / "test" / "0.tar", tmp_path / "copy.tar")
    shutil.copy(tmp_path / "copy.tar", data / "new-artist" / "test" / "0.tar")
    options.resume = True
    eval_stage.run(recipe, options)
    assert kept_times(tmp_path / "run") != times


def test_settings_are_in_every_row_and_in_the_report(drawings: Path, tmp_path: Path) -> None:
    changes = {"precision": "bf16", "resize": "squash", "decode": "fast", "sets": ["new-artist"]}
    result = run(drawings, tmp_path / "run", **changes)
    rows = read_results(result.outputs["results"]).results
    assert {(r.precision, r.resize, r.decode, len(r.prompts)) for r in rows} == {("bf16", "squash", "fast", 64)}
    said = "bf16, pictures squashed to a square, fast decoding"
    assert said in result.outputs["report"].read_text()
    assert "precision bf16, resize squash, decoding fast" in result.outputs["markdown"].read_text()
    assert result.outputs["csv"].read_text().splitlines()[0].startswith("model,fingerprint,set")


def test_scenes_probes_and_few_shot_have_rows(drawings: Path, tmp_path: Path) -> None:
    result = run(drawings, tmp_path / "scenes", suite="drawings-localised")
    rows = read_results(result.outputs["results"]).results
    assert [r.metric for r in rows] == ["patch_top1", "segmentation_miou", "patch_retrieval@1"]
    assert all(0 <= r.low <= r.value <= r.high <= 1 and 0 < r.chance < 1 for r in rows)
    probes = {
        "linear_probe": LinearProbeSection(weight_decays=[1e-3], max_iterations=20),
        "few_shot": FewShotSection(shots=[1], draws=2, max_iterations=20),
    }
    changes = {"sets": ["new-artist"], "use_cache": True, "cache_dir": tmp_path / "cache", **probes}
    found = [read_results(run(drawings, tmp_path / name, **changes).outputs["results"]).results for name in "ab"]
    assert [r.metric for r in found[0]] == ["top1", "top5", "linear_probe_top1", "few_shot_1_top1"]
    assert [r.value for r in found[0]] == [r.value for r in found[1]]  # the second time from the cache
    assert len(list((tmp_path / "cache" / "features").rglob("*.npy"))) == 2


def test_a_stock_open_clip_model_is_evaluated(drawings: Path, tmp_path: Path) -> None:
    result = run(drawings, tmp_path / "run", models={"stock": "open_clip:ViT-S-32-alt"}, sets=["never-seen"])
    results = read_results(result.outputs["results"])
    assert results.models[0].weights == "random weights of ViT-S-32-alt"
    assert results.models[0].image_size == 224
    with pytest.raises(UsageError, match="open_clip has no model 'ViT-nope'"):
        run(drawings, tmp_path / "other", models={"stock": "open_clip:ViT-nope"})


def test_missing_sets_are_fetched_from_the_hub(drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the network is made up: the hub's client writes a set where it is told to."""
    asked = []

    def snapshot_download(repo: str, *, repo_type: str, local_dir: Path, allow_patterns: list[str]) -> None:
        asked.append((repo, repo_type, allow_patterns))
        shutil.copytree(drawings / "eval" / "never-seen", local_dir)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    changes = {"suite": "eva27", "sets": ["dtd"], "fetch": True}
    with pytest.raises(EvatoolError, match="this is not DTD: 6 of 1880 pictures"):
        run(tmp_path / "data", tmp_path / "run", **changes)
    assert asked == [("clip-benchmark/wds_vtab-dtd", "dataset", ["*.txt", "test/*"])]
    assert (tmp_path / "data" / "dtd" / "classnames.txt").is_file()
    result = run(tmp_path / "data", tmp_path / "part", **changes, allow_partial=True)
    results = read_results(result.outputs["results"])
    assert results.sets[0].variant == "eva27/dtd, VTAB's test split (6 of 1880 pictures, 6 of 47 classes)"
    assert all(r.published is None and r.kind != "average" for r in results.results)


def test_a_model_of_another_input_size_decodes_to_its_own(drawings: Path, tmp_path: Path) -> None:
    results = read_results(
        run(drawings, tmp_path / "run", models={"a": TOY, "b": "EVA02-CLIP-debug"}, sets=["never-seen"]).outputs[
            "results"
        ]
    )
    assert [m.image_size for m in results.models] == [48, 32]
    assert results.failures == []


def test_published_numbers_stand_beside_those_of_a_published_model(
    drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real answers of a small model on a set of a suite, under a published model's name."""
    suite = tmp_path / "suite.toml"
    suite.write_text(
        'name = "own"\ntitle = "Own"\nabout = "One set"\nprepare = "copy it"\npartial = "named"\n'
        '[[sets]]\nname = "cifar10"\ntitle = "CIFAR-10"\nphrase = "CIFAR-10"\n'
        'about = "As if"\nkind = "classification"\nmetric = "top1"\n'
    )
    shutil.copytree(drawings / "eval" / "black-and-white", tmp_path / "sets" / "cifar10")
    load = result_rows.published_value
    as_b16 = lambda preset, *rest: load("EVA02-CLIP-B-16", *rest)  # noqa: E731
    monkeypatch.setattr(result_rows, "published_value", as_b16)
    result = run(tmp_path / "sets", tmp_path / "run", suite=str(suite))
    row = read_results(result.outputs["results"]).row("a model", "cifar10", "top1")
    assert row is not None
    assert row.published == pytest.approx(0.9846)
    html = result.outputs["report"].read_text()
    difference = 100 * (row.value - 0.9846)
    assert "98.46" in html or "98.5" in html
    assert f"{abs(difference):.1f}" in html
    assert "openclip_results.csv" in html
    assert "What the worst" in html or "taken for" in html
