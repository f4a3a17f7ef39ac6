"""Linear probe and few-shot classifiers on frozen features: logistic regression, on a CPU or a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from evatool.core.errors import DataError
from evatool.eval.predictions import ScoreResult

# N samples, E embedding, C classes


def linear_probe(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    num_classes: int,
    *,
    weight_decays: Sequence[float],
    holdout: float,
    max_iterations: int,
    seed: int,
    device: str = "cpu",
) -> ScoreResult:
    """Top-1 of logistic regression on all training features, its weight decay chosen on a held-out share of them.

    Args:
        train, test: unit features (N, E) and labels (N,), on the CPU.
        holdout: share of each class that is held out; a class with one sample stays in both parts.
    """
    fitted, holdout_rows = _split(train[1].numpy(), holdout, seed)
    accuracies = []
    for weight_decay in weight_decays if len(weight_decays) > 1 else ():
        weights = fit(train[0][fitted], train[1][fitted], num_classes, weight_decay, max_iterations, device)
        accuracies.append(float((predict(weights, train[0][holdout_rows]) == train[1][holdout_rows]).float().mean()))
    chosen = weight_decays[int(np.argmax(accuracies))] if accuracies else weight_decays[0]
    weights = fit(*train, num_classes, chosen, max_iterations, device)
    hits = (predict(weights, test[0]) == test[1]).numpy().astype(np.float32)
    return ScoreResult({"linear_probe_top1": hits}, {"linear_probe_top1": 1 / num_classes})


def few_shot(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    num_classes: int,
    *,
    shots: Sequence[int],
    draws: int,
    weight_decay: float,
    max_iterations: int,
    seed: int,
    device: str = "cpu",
    name: str = "the training set",
) -> ScoreResult:
    """Top-1 with `shots` training samples a class: each test sample's share of right answers over seeded draws.

    Raises: DataError naming a class that has fewer samples.
    """
    counts = np.bincount(train[1].numpy(), minlength=num_classes)
    if counts.min() < max(shots):
        raise DataError(
            f"class {int(counts.argmin())} of {name} has {counts.min()} training samples for {max(shots)} shots",
            expected=f"at least {max(shots)} samples of every class",
            fix=f"set eval.few_shot.shots to numbers up to {counts.min()}"
            if counts.min()
            else "leave eval.few_shot out",
        )
    scores: dict[str, NDArray[np.float64]] = {}
    for k in shots:
        hits = np.zeros(len(test[1]), dtype=np.float64)
        for draw in range(draws):
            chosen = _per_class(train[1].numpy(), k, np.random.default_rng((seed, k, draw)))
            weights = fit(train[0][chosen], train[1][chosen], num_classes, weight_decay, max_iterations, device)
            hits += (predict(weights, test[0]) == test[1]).numpy()
        scores[f"few_shot_{k}_top1"] = hits / draws
    return ScoreResult(scores, dict.fromkeys(scores, 1 / num_classes)).rounded()


def fit(
    features: Tensor, labels: Tensor, num_classes: int, weight_decay: float, max_iterations: int, device: str
) -> Tensor:
    """Multinomial logistic regression by full-batch L-BFGS: (E + 1, C) float32 on the CPU, the bias in the last row.

    Minimises mean cross-entropy + weight_decay / 2 * squared weights, of features scaled by sqrt(E); no randomness.
    """
    x, y = _scaled(features).to(device), labels.to(device)
    weights = torch.zeros(x.shape[1], num_classes, device=device, requires_grad=True)
    bias = torch.zeros(num_classes, device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights, bias], max_iter=max_iterations, history_size=10, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weights + bias, y) + 0.5 * weight_decay * weights.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return torch.cat([weights, bias[None]]).detach().cpu()


def predict(weights: Tensor, features: Tensor) -> Tensor:
    """(N,) the class of each feature row that the classifier scores highest.

    Args:
        weights: (E + 1, C), as `fit` gives them.
    """
    classes: Tensor = (_scaled(features) @ weights[:-1] + weights[-1]).argmax(dim=1)
    return classes


def _scaled(features: Tensor) -> Tensor:
    """Features as classifiers are fitted on them."""
    scale: float = features.shape[1] ** 0.5
    return features * scale  # a unit vector's entries then have a variance of about 1


def _per_class(labels: NDArray[Any], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`count` samples of every class that occurs."""
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    place = np.arange(len(order)) - np.searchsorted(labels[order], labels[order])
    return np.sort(order[place < count])


def _split(labels: NDArray[Any], share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Samples to fit on and samples to choose by, class by class; a class with one sample is in both."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    sorted_labels = labels[order]
    place = np.arange(len(order)) - np.searchsorted(sorted_labels, sorted_labels)
    size = np.searchsorted(sorted_labels, sorted_labels, side="right") - np.searchsorted(sorted_labels, sorted_labels)
    holdout_rows = place < np.maximum(1, np.round(share * size))
    return np.sort(order[~holdout_rows | (size == 1)]), np.sort(order[holdout_rows])
