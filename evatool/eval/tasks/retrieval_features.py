"""Features of images and captions that belong together, and the rank of each one's best right counterpart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from evatool.core.errors import DataError
from evatool.eval.encoder import EvaluationSet, SetEncoder
from evatool.eval.predictions import RetrievalResult
from evatool.eval.tasks.retrieval_ranks import retrieval_ranks

# I images, T distinct captions, E embedding


@dataclass(frozen=True)
class PairFeatures:
    """Normalised features of a retrieval set. A caption shared by several images is one row of `text`."""

    image: Tensor  # (I, E) float32, unit length
    text: Tensor  # (T, E) float32, unit length
    captions: list[str]  # T distinct captions, in order of first appearance
    pairs: NDArray[np.int64]  # (number of pairs, 2): image, caption; sorted, each once
    num_captions: int = 0  # as the set has them, with repetitions


def encode_pairs(encoder: SetEncoder, eval_set: EvaluationSet) -> PairFeatures:
    """Features of all images and of each distinct caption once; every rank must call it and gets all of them.

    A caption belongs to every image that has it: where two images share one, each is right for it.
    Raises:
        DataError: no samples, or an image without a caption.
        NumericalError: features that are not finite.
    """
    image, captions = encoder.encode_images(eval_set)
    if not captions:
        raise DataError(f"evaluation set {eval_set.name} has no samples", fix="prepare the set again")
    known: dict[str, int] = {}
    pairs: list[tuple[int, int]] = []
    for i, own in enumerate(captions):
        if not own:
            raise DataError(
                f"picture {i} of evaluation set {eval_set.name} has no caption",
                expected="at least one caption a picture, one a line in its .txt",
                fix="remove the picture or give it a caption",
            )
        pairs += [(i, known.setdefault(caption, len(known))) for caption in own]
    text = encoder.encode_texts(list(known), where=eval_set.name)
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
