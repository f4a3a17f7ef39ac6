"""Recall against a brute-force float64 reference and clip-benchmark, chance against counting, and the examples."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from clip_benchmark.metrics.zeroshot_retrieval import recall_at_k
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import ToyClip, ToySet, as_pictures, encoder_of

from evatool.core.errors import DataError, NumericalError
from evatool.eval.predictions import DIRECTIONS, RECALL_AT, Direction
from evatool.eval.tasks import retrieval_ranks as ranks
from evatool.eval.tasks.retrieval_examples import best_and_worst_retrievals
from evatool.eval.tasks.retrieval_features import PairFeatures, encode_pairs, retrieve


def brute_force_hits(scores: np.ndarray, right: np.ndarray, k: int) -> list[bool]:
    """Whether a right candidate is among the first k, ties counted against it; one query at a time."""
    hits = []
    for row, is_right in zip(scores, right, strict=True):
        best = max(s for s, r in zip(row, is_right, strict=True) if r)
        before = sum(1 for s, r in zip(row, is_right, strict=True) if not r and s >= best)
        hits.append(before < k)
    return hits


def features_of(image: np.ndarray, text: np.ndarray, right: np.ndarray) -> PairFeatures:
    """`right` (I, T) bool says which caption belongs to which picture."""
    pairs = np.argwhere(right)
    names = [f"caption {i}" for i in range(len(text))]
    return PairFeatures(torch.tensor(image).float(), torch.tensor(text).float(), names, pairs)


@st.composite
def pair_sets(draw: st.DrawFn) -> PairFeatures:
    """Few pictures and captions, each with one or more of the other; coarse features, so that ties occur."""
    num_images, num_texts = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    right = rng.random((num_images, num_texts)) < draw(st.floats(0, 0.6))
    right[np.arange(num_images), rng.integers(num_texts, size=num_images)] = True  # every picture has a caption
    right[rng.integers(num_images, size=num_texts), np.arange(num_texts)] = True  # every caption has a picture
    coarse = lambda n: rng.integers(-1, 2, size=(n, 3)) / 2.0  # noqa: E731
    return features_of(coarse(num_images), coarse(num_texts), right)


def right_matrix(features: PairFeatures) -> np.ndarray:
    right = np.zeros((len(features.image), len(features.text)), dtype=bool)
    right[features.pairs[:, 0], features.pairs[:, 1]] = True
    return right


@settings(max_examples=150, deadline=None)
@given(pair_sets(), st.integers(1, 20))
def test_hits_equal_brute_force_at_any_k(features: PairFeatures, k: int) -> None:
    scores = features.image.double().numpy() @ features.text.double().numpy().T
    right = right_matrix(features)
    result = retrieve(features)
    assert result.hits("image_to_text", k).tolist() == brute_force_hits(scores, right, k)
    assert result.hits("text_to_image", k).tolist() == brute_force_hits(scores.T, right.T, k)


def test_scores_in_blocks_give_the_same_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    features = random_pairs(60, 2)
    whole = retrieve(features)
    for name, size in (("_ROWS", 7), ("_COLUMNS", 11), ("_CELLS", 100)):  # blocks that do not divide the queries
        monkeypatch.setattr(ranks, name, size)
    blocks = retrieve(features)
    for direction in DIRECTIONS:
        assert blocks.rank(direction).tolist() == whole.rank(direction).tolist()


@pytest.mark.parametrize("distinct", [1, 40, 700], ids=["collapsed", "duplicates", "all-differ"])
@pytest.mark.parametrize("width", [5, 200])
def test_ranks_of_a_large_set_equal_float64(distinct: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_COLUMNS", 300)  # several tiles each way, wider and narrower than a group of marks
    g = torch.Generator().manual_seed(0)
    unit = lambda n: torch.nn.functional.normalize(torch.randn(n, width, generator=g), dim=1)  # noqa: E731
    text, image = unit(distinct)[torch.arange(400) % distinct], unit(distinct)[torch.arange(700) % distinct]
    pairs = np.stack([np.arange(700), np.arange(700) % 400], axis=1)
    of_text, of_image = ranks.retrieval_ranks(text, image, pairs)
    scores = torch.stack([(row * image.double()).sum(dim=1) for row in text.double()])
    right = torch.zeros(400, 700, dtype=torch.bool)
    right[pairs[:, 1], pairs[:, 0]] = True
    best, wrong = scores.masked_fill(~right, -torch.inf), scores.masked_fill(right, -torch.inf)
    assert of_text.tolist() == (wrong >= best.amax(dim=1, keepdim=True)).sum(dim=1).tolist()
    assert of_image.tolist() == (wrong >= best.amax(dim=0)).sum(dim=0).tolist()


def random_pairs(num_images: int, captions_each: int, seed: int = 0) -> PairFeatures:
    """Every picture has its own captions, their features near its own."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(num_images, 24))
    text = np.repeat(image, captions_each, axis=0) + 1.6 * rng.normal(size=(num_images * captions_each, 24))
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    return features_of(unit(image), unit(text), np.repeat(np.eye(num_images, dtype=bool), captions_each, axis=1))


@pytest.mark.parity
@pytest.mark.parametrize("k", RECALL_AT)
def test_recall_equals_clip_benchmark_where_no_captions_repeat(k: int) -> None:
    features = random_pairs(40, 3)
    scores, right = features.text @ features.image.T, torch.from_numpy(right_matrix(features)).T
    result = retrieve(features)
    theirs = {
        "text_to_image": (recall_at_k(scores, right, k) > 0).float().mean().item(),
        "image_to_text": (recall_at_k(scores.T, right.T, k) > 0).float().mean().item(),
    }
    ours = {direction: float(result.hits(direction, k).mean()) for direction in DIRECTIONS}
    assert ours == pytest.approx(theirs)
    assert 0 < ours["text_to_image"] < 1


def test_a_collapsed_model_finds_nothing() -> None:
    features = features_of(np.ones((12, 2)), np.ones((12, 2)), np.eye(12, dtype=bool))
    result = retrieve(features)
    for direction in DIRECTIONS:
        assert not result.hits(direction, 10).any()
        assert result.hits(direction, 12).all()


@pytest.mark.parametrize("k", [1, 3, 5, 8])
def test_chance_equals_counting_every_draw(k: int) -> None:
    right = np.array([[1, 1, 0, 0, 1], [0, 0, 1, 1, 0]], dtype=bool)  # two pictures, five captions
    features = features_of(np.eye(2), np.ones((5, 2)), right)
    draws = list(combinations(range(5), min(k, 5)))
    counted = np.mean([np.mean([right[q, list(d)].any() for d in draws]) for q in range(2)])
    assert retrieve(features).chance("image_to_text", k) == pytest.approx(counted)
    assert retrieve(features).chance("text_to_image", 1) == pytest.approx(0.5)


def test_equal_captions_are_one_query_with_several_right_pictures() -> None:
    g = torch.Generator().manual_seed(0)
    model = ToyClip(torch.randn(8, 4, generator=g))
    images = torch.randn(4, 4, generator=g)
    captions = [["a cat", "a pet"], ["a dog"], ["a cat"], ["a dog", "a dog"]]
    toy = ToySet(
        kind="retrieval",
        loader=[(as_pictures(images[:3]), captions[:3]), (as_pictures(images[3:]), captions[3:])],
    )
    counted: list[int] = []
    features = encode_pairs(encoder_of(model, on_batch=counted.append), toy)
    assert features.captions == ["a cat", "a pet", "a dog"]
    assert features.pairs.tolist() == [[0, 0], [0, 1], [1, 2], [2, 0], [3, 2]]
    assert counted == [3, 1]
    assert model.texts_encoded == 3
    assert torch.allclose(features.image, torch.nn.functional.normalize(images, dim=-1))
    result = retrieve(features)
    assert result.num_right_images.tolist() == [2, 1, 2]
    assert result.num_right_captions.tolist() == [2, 1, 1, 1]
    assert result.image_of_text.tolist() == [0, 0, 1]


def test_examples_are_the_clearest_hits_and_the_last_found() -> None:
    # query i and its right candidate i: leads 0.5, 0.1, 0.3, then two misses
    scores = np.array(
        [
            [0.9, 0.4, 0.2, 0.1, 0.0],
            [0.0, 0.6, 0.5, 0.2, 0.1],
            [0.1, 0.2, 0.8, 0.5, 0.0],
            [0.9, 0.8, 0.1, 0.2, 0.3],
            [0.5, 0.4, 0.3, 0.2, 0.1],
        ]
    )
    features = features_of(np.eye(5), scores, np.eye(5, dtype=bool))
    result = retrieve(features)
    best, worst = best_and_worst_retrievals(features, result, direction="text_to_image", count=2, num_found=3)
    assert [e.query for e in best] == [0, 2]
    assert [e.query for e in worst] == [4, 3]
    assert best[0].found == [0, 1, 2]
    assert best[0].is_right == [True, False, False]
    assert (worst[0].rank, worst[0].found, worst[0].right) == (4, [0, 1, 2], 4)
    assert worst[0].scores == pytest.approx([0.5, 0.4, 0.3])


@settings(max_examples=60, deadline=None)
@given(pair_sets(), st.sampled_from(DIRECTIONS))
def test_no_query_is_both_best_and_worst(features: PairFeatures, direction: Direction) -> None:
    result = retrieve(features)
    best, worst = best_and_worst_retrievals(features, result, direction=direction)
    assert not {e.query for e in best} & {e.query for e in worst}
    assert all(e.rank == 0 for e in best)
    assert all(e.rank > 0 for e in worst)
    assert all(any(e.is_right) for e in best)


@pytest.mark.parametrize(
    ("loader", "error", "says"),
    [
        pytest.param([], DataError, "no samples", id="empty"),
        pytest.param([(torch.ones(2, 4, 1, 1), [["a"], []])], DataError, "picture 1", id="no-caption"),
        pytest.param([(torch.full((1, 4, 1, 1), torch.inf), [["a"]])], NumericalError, "not finite", id="inf"),
    ],
)
def test_a_set_that_cannot_be_scored_is_refused(loader: list, error: type[Exception], says: str) -> None:
    model = ToyClip(torch.ones(4, 4))
    with pytest.raises(error, match=says):
        encode_pairs(encoder_of(model), ToySet(kind="retrieval", loader=loader))
