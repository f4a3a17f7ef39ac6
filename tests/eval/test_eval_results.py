"""results.json, kept predictions and galleries: read back equal, complete or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from toys import made_up_results

from evatool.core.atomic_io import write_bytes_atomically
from evatool.core.errors import DataError
from evatool.eval.metrics import Metric
from evatool.eval.prediction_store import KeptPredictions, read_predictions, write_predictions
from evatool.eval.predictions import ClassificationResult, RetrievalResult, ScoreResult
from evatool.eval.report.gallery import Gallery, data_uri, encode_image_file, read_gallery, write_gallery
from evatool.eval.results import (
    EvalResults,
    compared_pairs,
    file_name,
    read_results,
    write_results,
)


def test_results_read_back_equal(tmp_path: Path, failed_results: EvalResults) -> None:
    path = tmp_path / "results.json"
    write_results(path, failed_results)
    assert read_results(path) == failed_results


def test_the_documented_keys_are_there(tmp_path: Path, results: EvalResults) -> None:
    path = tmp_path / "results.json"
    write_results(path, results)
    row = json.loads(path.read_text())["results"][0]
    keys = ["model", "fingerprint", "set", "variant", "kind", "metric", "value", "low", "high", "chance", "n"]
    keys += ["num_classes", "seed", "seconds", "precision", "resize", "decode", "prompts"]
    assert list(row) == [*keys, "published", "published_source"]


def test_every_key_is_described_in_the_docs(tmp_path: Path, failed_results: EvalResults) -> None:
    path = tmp_path / "results.json"
    write_results(path, failed_results)
    table = json.loads(path.read_text())
    page = (Path(__file__).parents[2] / "docs" / "eval.md").read_text()
    keys = set(table) | {key for value in table.values() if isinstance(value, list) for row in value for key in row}
    assert {key for key in keys if f"`{key}`" not in page} == set()


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"schema": 0}', '{"schema": 1}', '{"schema": 1, "suite": "s", "results": [{"model": "m"}]}'],
    ids=["empty", "list", "other-schema", "nothing-else", "half-a-row"],
)
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        read_results(path)
    assert caught.value.where == str(path)


def kept(predictions: ClassificationResult | RetrievalResult | ScoreResult) -> KeptPredictions:
    made = made_up_results()
    settings = {"precision": "fp32", "resize": "shortest", "decode": "exact", "prompts": "ab"}
    return KeptPredictions("key", made.models[0], made.sets[0], settings, 1.5, predictions)


def test_predictions_are_compact_and_read_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 300, (50_000, 7)).astype(np.int32)
    margin = rng.random(50_000).astype(np.float16).astype(np.float32)
    predictions = ClassificationResult(ids[:, 0], ids[:, 1:6], ids[:, 6], 300, margin)
    path = tmp_path / "predictions" / "a" / "b.npz"
    write_predictions(path, kept(predictions))
    back = read_predictions(path)
    assert back.model == kept(predictions).model
    assert (back.key, back.seconds, back.set) == ("key", 1.5, kept(predictions).set)
    for name, value in vars(predictions).items():
        assert np.array_equal(getattr(back.predictions, name), value), name
    assert path.stat().st_size < 14 * 50_000


@pytest.mark.parametrize(
    "predictions",
    [
        RetrievalResult(*(np.arange(n, dtype=np.int32) for n in (6, 3, 6, 3)), np.arange(6, dtype=np.int32) // 2),
        ScoreResult(
            {"patch_top1": np.array([0.5, 1], np.float32), "r@1": np.zeros(3, np.float32)},
            {"patch_top1": 0.25, "r@1": 0.1},
        ),
    ],
    ids=["retrieval", "scores"],
)
def test_other_answers_read_back_with_the_same_metrics(
    tmp_path: Path, predictions: RetrievalResult | ScoreResult
) -> None:
    write_predictions(tmp_path / "p.npz", kept(predictions))
    back = read_predictions(tmp_path / "p.npz").predictions
    assert [(m.metric, m.value, m.chance) for m in back.metrics()] == [
        (m.metric, m.value, m.chance) for m in predictions.metrics()
    ]


def test_predictions_that_are_damaged_or_of_an_older_layout_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.npz"
    np.savez_compressed(path, rank=np.zeros(3))
    with pytest.raises(DataError, match="another layout"):
        read_predictions(path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match="cannot be read"):
        read_predictions(path)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    write_bytes_atomically(path, b"old", make_parents=True)

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_bytes_atomically(path, b"new", make_parents=True)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("name", "expected"), [("from scratch", "from_scratch"), ("../../etc", "_.._etc"), ("..", "_"), ("B-16+", "B-16+")]
)
def test_names_stay_inside_the_run_folder(name: str, expected: str) -> None:
    assert file_name(name) == expected


@pytest.mark.parametrize(
    ("models", "pairs"),
    [([], []), (["a"], []), (["a", "b"], [("a", "b")]), (["a", "b", "c"], [("a", "b"), ("b", "c"), ("a", "c")])],
    ids=["none", "one", "two", "three"],
)
def test_each_model_is_compared_with_the_one_before_and_the_last_with_the_first(models: list, pairs: list) -> None:
    assert compared_pairs(models) == pairs


def test_top5_is_left_out_where_it_says_nothing() -> None:
    labels = np.arange(4, dtype=np.int32)
    predictions = ClassificationResult(
        labels, np.zeros((4, 5), np.int32), np.zeros(4, np.int32), 5, np.zeros(4, np.float32)
    )
    assert [m.metric for m in predictions.metrics()] == ["top1"]


def test_a_measure_compares_the_same_samples() -> None:
    before, after = (Metric("top1", np.array([0, 1, 0, 0] * 50) == 1, 0.1), Metric("top1", np.ones(200) == 1, 0.1))
    change = before.difference_to(after, num_resamples=500, seed=0)
    assert change.value == 0.75
    assert change.excludes_zero


def test_galleries_read_back_equal(tmp_path: Path, gallery: Gallery) -> None:
    write_gallery(tmp_path / "gallery.json", gallery)
    assert read_gallery(tmp_path / "gallery.json") == gallery


def test_galleries_of_older_runs_are_read(tmp_path: Path, gallery: Gallery) -> None:
    write_gallery(tmp_path / "gallery.json", gallery)
    text = (tmp_path / "gallery.json").read_text().replace('"image":', '"picture":')
    (tmp_path / "old.json").write_text(text)
    assert '"picture":' in text
    assert read_gallery(tmp_path / "old.json") == gallery


@pytest.mark.parametrize("content", ["{", "[]", '{"best": []}'], ids=["cut-off", "list", "half"])
def test_a_damaged_gallery_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "gallery.json").write_text(content)
    with pytest.raises(DataError, match="retrieval examples"):
        read_gallery(tmp_path / "gallery.json")


def test_pictures_become_data_uris(tmp_path: Path, image: bytes) -> None:
    (tmp_path / "p.png").write_bytes(image)
    uri = data_uri(image)
    assert uri.startswith("data:image/png;base64,")
    assert data_uri(tmp_path / "p.png") == data_uri(str(tmp_path / "p.png")) == data_uri(uri) == uri


def test_large_pictures_shrink_and_keep_their_shape() -> None:
    import io

    from PIL import Image

    small = Image.open(io.BytesIO(encode_image_file(np.zeros((300, 600, 3), np.uint8), max_side=160)))
    assert small.size == (160, 80)


@pytest.mark.parametrize("content", [b"", b"<svg onload=alert(1)>"], ids=["empty", "not-a-picture"])
def test_what_is_no_picture_is_refused(content: bytes) -> None:
    with pytest.raises(DataError, match="no known format"):
        data_uri(content)
