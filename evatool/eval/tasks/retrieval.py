"""Image-text retrieval: recall in both directions, and the best and worst examples.

A caption belongs to every picture that has it: where two pictures share a caption, each is right for it. Candidates
with the same score as the right one count as ranked before it, so a collapsed model scores nothing by luck of order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evatool.core.errors import DataError
from evatool.distributed.collectives import gather_objects
from evatool.eval.encode import (
    Encoding,
    ImageMemory,
    encode_texts,
    fail_on_all_ranks,
    gather_rows,
    image_batches,
    own_numbers,
)
from evatool.eval.predictions import Direction, RetrievalResult
from evatool.eval.tasks.base import ClipModel, EvaluationSet
from evatool.eval.tasks.retrieval_ranks import retrieval_ranks

# I pictures, T distinct captions, Q queries, P candidates, E embedding

_HITS_LOOKED_AT = 2000  # for the clearest hits of a gallery; more would only cost time


@dataclass(frozen=True)
class PairFeatures:
    """Normalised features of a retrieval set. A caption shared by several pictures is one row of `text`."""

    image: Tensor  # (I, E) float32, unit length
    text: Tensor  # (T, E) float32, unit length
    captions: list[str]  # T distinct captions, in order of first appearance
    pairs: NDArray[np.int64]  # (number of pairs, 2): picture, caption; sorted, each once
    num_captions: int = 0  # as the set has them, with repetitions


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
    trim_text: bool = False,
    lockstep: bool = False,
    memory: ImageMemory | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> PairFeatures:
    """Features of all pictures and of each distinct caption once; every rank must call it and gets all of them.

    Args:
        trim_text, lockstep: see `Encoding`.
        memory: features of pictures seen in other sets, see `image_batches`.
    Raises:
        DataError: no samples, or a picture without a caption.
        NumericalError: features that are not finite.
    """
    how = Encoding(device, trim_text, lockstep)
    images: list[Tensor] = []
    captions: list[list[str]] = []
    with fail_on_all_ranks():
        for features, own in image_batches(model, eval_set.loader, how, where=eval_set.name, memory=memory):
            images.append(features.cpu())
            captions += [list(of_image) for of_image in own]
            if on_batch:
                on_batch(len(own))
    numbers = own_numbers(eval_set.loader, len(captions))
    named = [pair for part in gather_objects(list(zip(numbers.tolist(), captions, strict=True))) for pair in part]
    if not named:
        raise DataError(f"evaluation set {eval_set.name} has no samples", fix="prepare the set again")
    known: dict[str, int] = {}
    pairs: list[tuple[int, int]] = []
    for image, own in sorted(named, key=lambda pair: pair[0]):
        if not own:
            raise DataError(
                f"picture {image} of evaluation set {eval_set.name} has no caption",
                expected="at least one caption a picture, one a line in its .txt",
                fix="remove the picture or give it a caption",
            )
        pairs += [(image, known.setdefault(caption, len(known))) for caption in own]
    image = gather_rows(torch.cat(images) if images else torch.zeros(0, 0), numbers, len(named))
    text = encode_texts(model, tokenizer, list(known), how, where=eval_set.name)
    return PairFeatures(image, text, list(known), np.unique(np.asarray(pairs, dtype=np.int64), axis=0), len(pairs))


def retrieve(features: PairFeatures, *, device: str = "cpu") -> RetrievalResult:
    """Ranks in both directions, those of float64 scores; the matrix of similarities never exists.

    Every rank must call it; each does its share.
    """
    by_image = features.pairs
    by_text = by_image[np.lexsort((by_image[:, 0], by_image[:, 1]))][:, ::-1]
    text_to_image, image_to_text = retrieval_ranks(features.text, features.image, by_image, device=device)
    return RetrievalResult(
        text_to_image=text_to_image,
        image_to_text=image_to_text,
        num_right_images=np.bincount(by_image[:, 1], minlength=len(features.text)).astype(np.int32),
        num_right_captions=np.bincount(by_image[:, 0], minlength=len(features.image)).astype(np.int32),
        image_of_text=by_text[np.unique(by_text[:, 0], return_index=True)[1], 1].astype(np.int32),
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
