"""A task from outside the package: two images a sample, through the public entry, with results that are read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import ToyClip, ToySet

from evatool.eval.compare import compare_runs
from evatool.eval.encode import Encoding, ImageGroups, image_batches
from evatool.eval.encoder import EvaluationSet, SetEncoder
from evatool.eval.evaluate import SetEvaluation, evaluate
from evatool.eval.prediction_store import prediction_path, read_predictions, write_predictions
from evatool.eval.predictions import ScoreResult
from evatool.eval.report.page import write_eval_report
from evatool.eval.results import ModelRecord, read_results, write_results
from evatool.eval.task_wording import TaskWording
from evatool.eval.tasks.base import EvalTask, Predicted
from evatool.inference.loaded_clip import load_clip


class WhichImage(EvalTask[ScoreResult]):
    """Of two images, the one that shows the class that is asked for. Batches are ((B, 2, 3, S, S), class ids (B,));
    the right image is the first one."""

    kind = "which-image"
    result = ScoreResult
    wording = TaskWording(
        main_metrics=("right_image",), labels={"right_image": "right image of two"}, headline="finds {hits} of {n}"
    )

    def open_targets(self, encoder: SetEncoder, eval_set: EvaluationSet) -> Tensor:
        return encoder.text_classifier(eval_set)

    def predict(self, encoder: SetEncoder, eval_set: EvaluationSet, targets: Tensor) -> Predicted[ScoreResult]:
        def compare(features: Tensor, classes: Tensor) -> dict[str, np.ndarray]:
            scores = (features * targets.T[classes][:, None]).sum(dim=-1)  # (B, 2)
            return {"right": (scores[:, 0] > scores[:, 1]).numpy().astype(np.float32)}

        found = encoder.over_batches(eval_set, compare, reduction="none")
        return Predicted(ScoreResult({"right_image": found["right"]}, {"right_image": 0.5}))


RIGHT = [True, True, False, True, False, True, True]


def pairs() -> ToySet:
    """Seven pairs in batches of three; the first image is nearer to the class where RIGHT says so."""
    classes = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    near, far = torch.eye(3)[classes], torch.eye(3)[(classes + 1) % 3]
    first = torch.tensor(RIGHT)[:, None]
    images = torch.stack([torch.where(first, near, far), torch.where(first, far, near)], dim=1)
    batches = [(images[i : i + 3, :, :, None, None], classes[i : i + 3]) for i in range(0, 7, 3)]
    return ToySet("pairs", WhichImage.kind, ["a", "b", "c"], ["{c}"], batches)


def evaluated(name: str = "toy") -> SetEvaluation:
    record = ModelRecord(name, "", "ab" * 32, 1, 9)
    return evaluate(ToyClip(torch.eye(3)), WhichImage(), pairs(), model_record=record, num_bootstrap=200)


def test_a_task_with_two_images_a_sample_has_metrics_with_intervals() -> None:
    counted: list[int] = []
    found = evaluate(ToyClip(torch.eye(3)), WhichImage(), pairs(), on_batch=counted.append)
    (row,) = found.results.results
    assert (row.metric, row.kind, row.n, row.chance) == ("right_image", "which-image", 7, 0.5)
    assert row.value == pytest.approx(5 / 7)
    assert 0 < row.low < row.value < row.high <= 1
    assert found.kept.predictions.scores["right_image"].astype(bool).tolist() == RIGHT
    assert counted == [3, 3, 1]


def test_its_results_and_predictions_are_written_read_and_reported(tmp_path: Path) -> None:
    found = evaluated()
    write_results(tmp_path / "results.json", found.results)
    again = read_results(tmp_path / "results.json")
    assert again.results == found.results.results
    assert again.sets == found.results.sets
    write_predictions(tmp_path / "p.npz", found.kept)
    kept = read_predictions(tmp_path / "p.npz")
    assert kept.set.kind == "which-image"
    assert kept.predictions.metrics()[0].value == pytest.approx(5 / 7)
    write_eval_report(tmp_path / "worded.html", found.results)
    assert "right image of two" in (tmp_path / "worded.html").read_text()
    write_eval_report(tmp_path / "plain.html", again)  # without the task its metric goes by its own name
    assert "right_image" in (tmp_path / "plain.html").read_text()


def test_runs_with_it_are_compared(tmp_path: Path) -> None:
    for run, name in (("a", "one"), ("b", "two")):
        found = evaluated(name)
        write_results(tmp_path / run / "results.json", found.results)
        write_predictions(prediction_path(tmp_path / run, name, "pairs"), found.kept)
    merged = compare_runs([tmp_path / "a", tmp_path / "b"], tasks=[WhichImage()])
    (difference,) = merged.differences
    assert (difference.metric, difference.value, difference.n) == ("right_image", 0.0, 7)


def test_a_loaded_model_is_evaluated_without_more() -> None:
    clip = load_clip("EVA02-CLIP-debug")
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 2, 3, clip.image_size, clip.image_size), dtype=torch.uint8, generator=g)
    eval_set = ToySet("pairs", WhichImage.kind, ["cat", "dog"], ["a {c}"], [(images, torch.tensor([0, 1, 0, 1]))])
    found = evaluate(clip, WhichImage(), eval_set)
    assert found.results.results[0].n == 4


# ---------------------------------------------------------------------------------------- samples of several images


def features_of(images: Any, reduction: Any = "mean") -> Any:
    encode = lambda x: x.flatten(1).float()  # noqa: E731
    ((features, targets),) = image_batches(encode, [(images, "t")], Encoding(), where="set", reduction=reduction)
    assert targets == "t"
    return features


def test_several_images_are_reduced_to_the_mean_of_their_unit_features() -> None:
    images = torch.tensor([[[2.0, 0], [0, 5]], [[0, 1], [0, 3]]])[:, :, :, None, None]  # (B, K, E, 1, 1)
    expected = torch.tensor([[2**-0.5, 2**-0.5], [0, 1]])
    torch.testing.assert_close(features_of(images), expected)
    assert features_of(images, "none").tolist() == [[[1, 0], [0, 1]], [[0, 1], [0, 1]]]


def test_samples_may_have_different_numbers_of_images() -> None:
    groups = ImageGroups(torch.tensor([[2.0, 0], [0, 5], [3, 0]])[:, :, None, None], torch.tensor([2, 1]))
    torch.testing.assert_close(features_of(groups), torch.tensor([[2**-0.5, 2**-0.5], [1, 0]]))
    assert [rows.tolist() for rows in features_of(groups, "none")] == [[[1, 0], [0, 1]], [[1, 0]]]


def test_a_batch_is_one_pass_and_made_up_passes_have_its_images_size() -> None:
    """In lockstep a rank with fewer batches than another goes through as many passes."""

    class Loader(list[Any]):
        most_batches = 3

    passes: list[tuple[int, ...]] = []

    def encode(images: Tensor) -> Tensor:
        passes.append(tuple(images.shape))
        return images.flatten(1).float() + 1

    loader = Loader([(torch.ones(4, 2, 3, 5, 7), None)])
    assert len(list(image_batches(encode, loader, Encoding(lockstep=True), where="set"))) == 1
    assert passes == [(8, 3, 5, 7), (1, 3, 5, 7), (1, 3, 5, 7)]
