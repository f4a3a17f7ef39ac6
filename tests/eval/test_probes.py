"""Linear probe against scikit-learn, few-shot draws, and features that never outlive their weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from toys import ToyClip, ToySet, as_pictures, encoder_of

from evatool.core.errors import DataError
from evatool.eval.cache import TensorCache
from evatool.eval.tasks.logistic_regression import few_shot, fit, linear_probe, predict
from evatool.eval.tasks.probes import image_features

PROBE = {"weight_decays": [1e-4, 1e-2], "holdout": 0.25, "max_iterations": 100, "seed": 0}
SHOTS = {"draws": 3, "weight_decay": 1e-3, "max_iterations": 50, "seed": 0}


def clusters(n: int = 160, classes: int = 4, width: int = 8, noise: float = 0.8, seed: int = 0) -> tuple:
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(n) % classes
    features = torch.nn.functional.normalize(centres[labels] + noise * torch.randn(n, width, generator=g), dim=1)
    return features, labels


@pytest.mark.parity
def test_the_fit_is_scikit_learns() -> None:
    features, labels = clusters()
    test, _ = clusters(seed=1)
    weight_decay = 1e-2
    weights = fit(features, labels, 4, weight_decay, 500, "cpu")
    x = features.numpy() * np.sqrt(8)
    theirs = LogisticRegression(C=1 / (weight_decay * len(x)), max_iter=5000, tol=1e-8).fit(x, labels.numpy())
    ours = (test * 8**0.5) @ weights[:-1] + weights[-1]
    reference = test.numpy() * np.sqrt(8) @ theirs.coef_.T + theirs.intercept_
    difference = (ours - ours.mean(1, keepdim=True)).numpy() - (reference - reference.mean(1, keepdims=True))
    assert np.abs(difference).max() < 5e-3
    assert predict(weights, test).tolist() == theirs.predict(test.numpy() * np.sqrt(8)).tolist()


def test_a_probe_tells_clusters_apart_and_is_the_same_twice() -> None:
    train, test = clusters(), clusters(seed=1)
    results = [linear_probe(train, test, 4, **PROBE) for _ in range(2)]
    assert results[0].scores["linear_probe_top1"].mean() > 0.7
    assert np.array_equal(results[0].scores["linear_probe_top1"], results[1].scores["linear_probe_top1"])
    assert results[0].chance == {"linear_probe_top1": 0.25}


def test_one_sample_a_class_is_enough_for_a_probe() -> None:
    train = clusters(n=4)
    assert linear_probe(train, train, 4, **PROBE).scores["linear_probe_top1"].mean() == 1


def test_more_shots_help_and_draws_are_averaged() -> None:
    found = few_shot(clusters(n=400), clusters(seed=1, n=400), 4, shots=[1, 16], **SHOTS)
    one, many = (found.scores[f"few_shot_{k}_top1"] for k in (1, 16))
    assert many.mean() > one.mean() > 0.25
    assert set(np.round(3 * one).tolist()) <= {0.0, 1.0, 2.0, 3.0}


def test_too_few_samples_of_a_class_are_named() -> None:
    features, labels = clusters(n=41)
    with pytest.raises(DataError, match="class 1 of new-shading has 10 training samples for 11 shots") as caught:
        few_shot((features, labels), (features, labels), 4, shots=[2, 11], name="new-shading", **SHOTS)
    assert "up to 10" in str(caught.value.fix)


@dataclass
class Stamped:
    """Samples of which only the stamp is asked for."""

    stamp: str


def test_features_are_kept_by_weights_and_by_the_sets_files(tmp_path: Path) -> None:
    images = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    toy = ToySet(loader=[(as_pictures(images), torch.arange(6))])
    counted: list[int] = []

    def features(weights: str, stamp: str) -> torch.Tensor:
        store = TensorCache(tmp_path, "features", weights)
        model = ToyClip(torch.eye(4))
        toy.samples = Stamped(stamp)
        return image_features(encoder_of(model, on_batch=counted.append), toy, store)[0]

    first = features("a", "files-1")
    assert torch.equal(features("a", "files-1"), first)
    assert counted == [6]
    features("b", "files-1")  # a retrained checkpoint at the same path
    features("a", "files-2")
    assert counted == [6, 6, 6]
