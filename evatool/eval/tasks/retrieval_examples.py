"""The queries of a retrieval set that a model answers best and worst."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evatool.eval.predictions import Direction, RetrievalResult
from evatool.eval.tasks.retrieval_features import PairFeatures

# Q queries, P candidates, E embedding

_HITS_LOOKED_AT = 2000  # for the clearest hits of a gallery; more would only cost time


@dataclass(frozen=True)
class RetrievalExample:
    """One query with what was found first. Indices are into the images or the distinct captions of the set."""

    direction: Direction
    query: int
    rank: int  # wrong candidates before the best right one
    found: list[int]  # the first candidates, best first
    is_right: list[bool]  # one a candidate found
    scores: list[float]  # cosine, one a candidate found
    right: int  # the best-ranked right candidate


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
    rank = result.rank(direction)
    pairs = features.pairs if direction == "image_to_text" else features.pairs[:, ::-1]
    right_of: dict[int, list[int]] = {}
    for query, candidate in pairs.tolist():
        right_of.setdefault(query, []).append(candidate)

    hits = np.flatnonzero(rank == 0)[:_HITS_LOOKED_AT]
    lead = np.array([_lead(query_features[q], candidates, right_of[q]) for q in hits.tolist()])
    best = hits[np.argsort(-lead, kind="stable")][:count] if hits.size else hits
    misses = np.flatnonzero(rank > 0)
    worst = misses[np.argsort(-rank[misses], kind="stable")][:count]

    def example(query: int) -> RetrievalExample:
        scores = _cosines(query_features[query], candidates)
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


def _lead(query: Tensor, candidates: Tensor, right: Sequence[int]) -> float:
    """Cosine of the best right candidate less that of the best wrong one; infinite where all candidates are right."""
    scores = _cosines(query, candidates)
    best_right = float(scores[list(right)].max())
    scores[list(right)] = -torch.inf
    return best_right - float(scores.max())


def _cosines(query: Tensor, candidates: Tensor) -> Tensor:
    """(P,) float64, in blocks: a float64 copy of all candidates could be larger than the features themselves."""
    step = max(1, 2**22 // candidates.shape[1])
    blocks = [candidates[i : i + step].double() @ query.double() for i in range(0, len(candidates), step)]
    return torch.cat(blocks)
