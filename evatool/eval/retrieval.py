"""Image-text retrieval: recall in both directions, and the best and worst examples.

A caption belongs to every picture that has it: where two pictures share a caption, each is right for it. Candidates
with the same score as the right one count as ranked before it, so a collapsed model scores nothing by luck of order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evatool.errors import DataError, NumericalError
from evatool.eval.sets import ClipModel, EvaluationSet

# I pictures, T distinct captions, Q queries, P candidates, E embedding

RECALL_AT = (1, 5, 10)
Direction = Literal["text_to_image", "image_to_text"]
DIRECTIONS: tuple[Direction, ...] = ("text_to_image", "image_to_text")
# queries x candidates held at once in float64: 32 MiB of scores
_CELLS = 2**22


@dataclass(frozen=True)
class PairFeatures:
    """Normalised features of a retrieval set. A caption shared by several pictures is one row of `text`."""

    image: Tensor  # (I, E) float32, unit length
    text: Tensor  # (T, E) float32, unit length
    captions: list[str]  # T distinct captions, in order of first appearance
    pairs: NDArray[np.int64]  # (number of pairs, 2): picture, caption; sorted, each once


@dataclass(frozen=True)
class RetrievalResult:
    """Ranks of one model on one set. A rank counts the wrong candidates before the best right one; 0 is a hit at 1."""

    text_to_image: NDArray[np.int32]  # (T,)
    image_to_text: NDArray[np.int32]  # (I,)
    num_right_images: NDArray[np.int32]  # (T,) right pictures of each caption
    num_right_captions: NDArray[np.int32]  # (I,) right captions of each picture
    picture_of_text: NDArray[np.int32]  # (T,) first picture of each caption; captions of one picture are one cluster

    def rank(self, direction: Direction) -> NDArray[np.int32]:
        """(Q,) ranks of one direction."""
        return self.text_to_image if direction == "text_to_image" else self.image_to_text

    def hits(self, direction: Direction, k: int) -> NDArray[np.bool_]:
        """(Q,) True where a right candidate is among the first k."""
        return self.rank(direction) < k

    def chance(self, direction: Direction, k: int) -> float:
        """Recall at k of candidates in random order, averaged over the queries."""
        if direction == "text_to_image":
            return _chance_of_hit(self.num_right_images, len(self.image_to_text), k)
        return _chance_of_hit(self.num_right_captions, len(self.text_to_image), k)


@dataclass(frozen=True)
class RetrievalExample:
    """One query with what was found first. Indices are into the pictures or the distinct captions of the set."""

    direction: Direction
    query: int
    rank: int  # wrong candidates before the best right one
    found: list[int]  # the first candidates, best first
    is_right: list[bool]  # one a candidate found
    scores: list[float]  # cosine, one a candidate found
    right: int  # the best-ranked right candidate


def encode_pairs(
    model: ClipModel,
    tokenizer: Callable[[Any], Tensor],
    eval_set: EvaluationSet,
    *,
    device: str = "cpu",
    on_batch: Callable[[int], None] | None = None,
) -> PairFeatures:
    """Features of all pictures and of each distinct caption once.

    Raises:
        DataError: no samples, or a picture without a caption.
        NumericalError: features that are not finite.
    """
    images: list[Tensor] = []
    texts: list[Tensor] = []
    known: dict[str, int] = {}
    pairs: list[tuple[int, int]] = []
    num_images = 0
    with torch.no_grad():
        for pictures, captions in eval_set.loader:
            first_new = len(known)
            for offset, own in enumerate(captions):
                if not own:
                    raise DataError(
                        f"picture {num_images + offset} of evaluation set {eval_set.name} has no caption",
                        expected="at least one caption a picture, one a line in its .txt",
                        fix="remove the picture or give it a caption",
                    )
                pairs += [(num_images + offset, known.setdefault(caption, len(known))) for caption in own]
            images.append(_unit(model.encode_image(pictures.to(device)), eval_set.name))
            fresh = list(known)[first_new:]
            if fresh:
                texts.append(_unit(model.encode_text(tokenizer(fresh).to(device)), eval_set.name))
            num_images += len(captions)
            if on_batch:
                on_batch(len(captions))
    if not images:
        raise DataError(f"evaluation set {eval_set.name} has no samples", fix="prepare the set again")
    unique = np.unique(np.asarray(pairs, dtype=np.int64), axis=0)
    return PairFeatures(torch.cat(images), torch.cat(texts), list(known), unique)


def retrieve(features: PairFeatures) -> RetrievalResult:
    """Ranks in both directions; scores in float64 and in blocks, so that the full matrix never exists."""
    by_image = features.pairs
    by_text = by_image[np.lexsort((by_image[:, 0], by_image[:, 1]))][:, ::-1]
    return RetrievalResult(
        text_to_image=_ranks(features.text, features.image, by_text),
        image_to_text=_ranks(features.image, features.text, by_image),
        num_right_images=np.bincount(by_image[:, 1], minlength=len(features.text)).astype(np.int32),
        num_right_captions=np.bincount(by_image[:, 0], minlength=len(features.image)).astype(np.int32),
        picture_of_text=by_text[np.unique(by_text[:, 0], return_index=True)[1], 1].astype(np.int32),
    )


def best_and_worst_retrievals(
    features: PairFeatures, result: RetrievalResult, *, direction: Direction, count: int = 3, num_found: int = 5
) -> tuple[list[RetrievalExample], list[RetrievalExample]]:
    """The clearest hits and the clearest misses of one direction.

    Best: a right candidate first, with the largest lead in cosine over the best wrong one. Worst: the right candidates
    found last. Ties go to the earlier query. A query is never in both lists.

    Returns: (best, worst), each at most `count` long; best holds hits at 1 only, so it may be shorter, even empty.
    """
    query_features, candidates = (
        (features.text, features.image) if direction == "text_to_image" else (features.image, features.text)
    )
    candidates = candidates.double()
    rank = result.rank(direction)
    pairs = features.pairs if direction == "image_to_text" else features.pairs[:, ::-1]
    right_of: dict[int, list[int]] = {}
    for query, candidate in pairs.tolist():
        right_of.setdefault(query, []).append(candidate)

    hits = np.flatnonzero(rank == 0)
    lead = np.array([_lead(query_features[q], candidates, right_of[q]) for q in hits.tolist()])
    best = hits[np.argsort(-lead, kind="stable")][:count] if hits.size else hits
    misses = np.flatnonzero(rank > 0)
    worst = misses[np.argsort(-rank[misses], kind="stable")][:count]

    def example(query: int) -> RetrievalExample:
        scores = candidates @ query_features[query].double()
        order = torch.sort(scores, descending=True, stable=True).indices[:num_found].tolist()
        right = max(right_of[query], key=lambda c: float(scores[c]))
        return RetrievalExample(
            direction=direction,
            query=query,
            rank=int(rank[query]),
            found=order,
            is_right=[c in right_of[query] for c in order],
            scores=[float(scores[c]) for c in order],
            right=right,
        )

    return [example(q) for q in best.tolist()], [example(q) for q in worst.tolist()]


def _ranks(queries: Tensor, candidates: Tensor, pairs: NDArray[np.int64]) -> NDArray[np.int32]:
    """(Q,) wrong candidates that score at least as high as the best right one. `pairs`: (query, candidate), sorted."""
    wide = candidates.double()
    starts = np.searchsorted(pairs[:, 0], np.arange(len(queries) + 1))
    rows = max(1, _CELLS // max(1, len(candidates)))
    ranks = []
    for start in range(0, len(queries), rows):
        stop = min(start + rows, len(queries))
        own = torch.from_numpy(pairs[starts[start] : starts[stop]] - np.array([start, 0]))
        scores = queries[start:stop].double() @ wide.T
        right_scores = scores[own[:, 0], own[:, 1]]
        best = torch.full((stop - start,), -torch.inf, dtype=torch.float64, device=scores.device)
        best = best.scatter_reduce(0, own[:, 0].to(scores.device), right_scores, reduce="amax")
        scores[own[:, 0], own[:, 1]] = -torch.inf
        ranks.append((scores >= best[:, None]).sum(dim=1).cpu().numpy())
    return np.concatenate(ranks).astype(np.int32)


def _lead(query: Tensor, candidates: Tensor, right: Sequence[int]) -> float:
    """Cosine of the best right candidate less that of the best wrong one; infinite where all candidates are right."""
    scores = candidates @ query.double()
    best_right = float(scores[list(right)].max())
    scores[list(right)] = -torch.inf
    return best_right - float(scores.max())


def _unit(features: Tensor, name: str) -> Tensor:
    """(B, E) features at unit length, float32 on the CPU."""
    unit = torch.nn.functional.normalize(features.float(), dim=-1).cpu()
    if not bool(torch.isfinite(unit).all()):
        raise NumericalError(
            f"the model gives features that are not finite on {name}",
            expected="finite numbers",
            fix="evaluate an earlier checkpoint; the weights themselves are likely not finite",
        )
    return unit


def _chance_of_hit(num_right: NDArray[np.int32], num_candidates: int, k: int) -> float:
    """1 - C(P - r, k) / C(P, k), averaged over queries with r right ones among P candidates."""
    total = 0.0
    for r, queries in zip(*np.unique(num_right, return_counts=True), strict=True):
        drawn = np.arange(min(k, num_candidates))
        miss = np.prod(np.clip(num_candidates - r - drawn, 0, None) / (num_candidates - drawn))
        total += float(queries) * (1.0 - float(miss))
    return total / num_right.size
