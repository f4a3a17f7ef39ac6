"""Zero-shot answers against a float64 reference, ties, shared classifiers and bad sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import zeroshot_classification as benchmark
from toys import ToyClip, ToySet, as_pictures, classify

from evatool.core.errors import DataError, EvatoolError, NumericalError
from evatool.eval.text_classifier import ClassifierMemory


def random_set(num_samples: int = 90, num_classes: int = 12, dim: int = 16, num_templates: int = 3, seed: int = 0):
    """A model with random text features and a set whose pictures lean towards their class."""
    g = torch.Generator().manual_seed(seed)
    text = torch.randn(num_classes * num_templates, dim, generator=g)
    labels = torch.randint(num_classes, (num_samples,), generator=g)
    images = text[labels * num_templates] + 1.5 * torch.randn(num_samples, dim, generator=g)
    batches = [(as_pictures(images[i : i + 32]), labels[i : i + 32]) for i in range(0, num_samples, 32)]
    templates = [f"{{c}} {i}" for i in range(num_templates)]
    toy = ToySet(classnames=[f"class {i}" for i in range(num_classes)], templates=templates, loader=batches)
    return ToyClip(text), toy, images, labels


def reference_logits(model: ToyClip, images: torch.Tensor, num_templates: int) -> np.ndarray:
    """Cosine to the normalised mean of each class's normalised prompts, in float64."""
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    prompts = unit(model.text_features.double().numpy()).reshape(-1, num_templates, images.shape[1])
    return unit(images.double().numpy()) @ unit(prompts.mean(axis=1)).T


def test_answers_equal_a_float64_reference() -> None:
    model, toy, images, labels = random_set()
    predictions = classify(model, model.tokenizer, toy)
    logits = reference_logits(model, images, 3)
    order = np.argsort(-logits, axis=1)
    own = np.take_along_axis(logits, labels.numpy()[:, None], axis=1)
    assert predictions.labels.tolist() == labels.tolist()
    assert predictions.top.tolist() == order[:, :5].tolist()
    assert predictions.rank.tolist() == (logits > own).sum(axis=1).tolist()
    assert predictions.correct(1).mean() == (order[:, 0] == labels.numpy()).mean()
    assert 0 < predictions.correct(1).sum() < predictions.correct(5).sum() < len(labels)


@pytest.mark.parity
def test_top1_equals_clip_benchmark_sample_by_sample() -> None:
    model, toy, _, _ = random_set(seed=3)
    predictions = classify(model, model.tokenizer, toy)
    weights = benchmark.zero_shot_classifier(model, model.tokenizer, toy.classnames, toy.templates, "cpu", amp=False)
    logits, target = benchmark.run_classification(model, weights, toy.loader, "cpu", amp=False)
    assert predictions.top[:, 0].tolist() == logits.argmax(dim=1).tolist()
    assert predictions.labels.tolist() == target.tolist()


def test_the_last_batch_may_be_smaller_and_progress_counts_pictures() -> None:
    model, toy, _, _ = random_set(num_samples=70)
    counted: list[int] = []
    predictions = classify(model, model.tokenizer, toy, on_batch=counted.append)
    assert counted == [32, 32, 6]
    assert predictions.rank.shape == (70,)


def test_fewer_than_five_classes_keep_them_all() -> None:
    model, toy, _, _ = random_set(num_classes=3)
    predictions = classify(model, model.tokenizer, toy)
    assert predictions.top.shape == (90, 3)
    assert predictions.correct(3).all()


def test_equal_logits_rank_by_class_id() -> None:
    model = ToyClip(torch.ones(4, 2))  # every class looks the same
    toy = ToySet(classnames=list("abcd"), loader=[(as_pictures(torch.ones(4, 2)), torch.arange(4))])
    predictions = classify(model, model.tokenizer, toy)
    assert predictions.top.tolist() == [[0, 1, 2, 3]] * 4
    assert predictions.rank.tolist() == [0, 1, 2, 3]


def test_sets_with_the_same_prompts_share_their_classifier() -> None:
    model, toy, _, _ = random_set()
    stores = [ClassifierMemory()]
    first = classify(model, model.tokenizer, toy, stores=stores)
    encoded = model.texts_encoded
    again = classify(model, model.tokenizer, toy, stores=stores)
    assert encoded == 36
    assert model.texts_encoded == encoded
    assert again.rank.tolist() == first.rank.tolist()
    toy.templates = toy.templates[:1]
    classify(model, model.tokenizer, toy, stores=stores)
    assert model.texts_encoded == encoded + 12


def test_the_largest_class_is_the_accuracy_of_always_naming_it() -> None:
    model = ToyClip(torch.eye(3))
    toy = ToySet(classnames=list("abc"), loader=[(as_pictures(torch.eye(3)[[0, 1, 1, 1]]), torch.tensor([0, 1, 1, 1]))])
    assert classify(model, model.tokenizer, toy).largest_class_share == 0.75


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        pytest.param({"classnames": []}, DataError, "classnames.txt", id="no-class-names"),
        pytest.param({"templates": []}, DataError, "zeroshot_classification_templates.txt", id="no-templates"),
        pytest.param({"templates": ["{c}", "a photo"]}, DataError, "line 2", id="template-without-class"),
        pytest.param({"templates": ["{c}", "a {photo} of {c}"]}, DataError, "other braces", id="other-braces"),
        pytest.param({"loader": []}, DataError, "no samples", id="empty"),
        pytest.param(
            {"loader": [(torch.ones(2, 4, 1, 1), torch.tensor([0, 2]))]}, DataError, "class id 2", id="id-too-large"
        ),
        pytest.param(
            {"loader": [(torch.ones(2, 4, 1, 1), torch.tensor([-1, 0]))]}, DataError, "class id -1", id="id-negative"
        ),
        pytest.param(
            {"loader": [(torch.ones(2, 4, 1, 1), torch.ones(2, 2))]}, DataError, "2-dimensional", id="multilabel"
        ),
        pytest.param(
            {"loader": [(torch.full((1, 4, 1, 1), torch.nan), torch.tensor([0]))]},
            NumericalError,
            "image features",
            id="nan",
        ),
    ],
)
def test_a_set_that_cannot_be_scored_is_refused(change: dict, error: type[EvatoolError], says: str) -> None:
    model = ToyClip(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
    toy = ToySet(classnames=["a", "b"], loader=[(torch.ones(1, 4, 1, 1), torch.tensor([0]))])
    for name, value in change.items():
        setattr(toy, name, value)
    with pytest.raises(error, match=says) as caught:
        classify(model, model.tokenizer, toy)
    assert caught.value.fix


def test_text_features_that_are_not_finite_are_refused() -> None:
    model = ToyClip(torch.full((2, 4), torch.inf))
    toy = ToySet(classnames=["a", "b"], loader=[(torch.ones(1, 4, 1, 1), torch.tensor([0]))])
    with pytest.raises(NumericalError, match="text features"):
        classify(model, model.tokenizer, toy)
