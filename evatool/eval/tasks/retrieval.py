"""Image-text retrieval: recall in both directions, and the best and worst examples.

Candidates with the same score as the right one count as ranked before it, so a collapsed model scores nothing by luck
of order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from evatool.eval.predictions import DIRECTIONS, RetrievalResult
from evatool.eval.report.gallery import Gallery, build_gallery, needed_images
from evatool.eval.task_wording import TaskWording
from evatool.eval.tasks.base import EvalTask, Predicted

if TYPE_CHECKING:
    from evatool.eval.encoder import EvaluationSet, SetEncoder
    from evatool.eval.tasks.retrieval_features import PairFeatures


class Retrieval(EvalTask[RetrievalResult]):
    """Each caption looks for its image among all images, and each image for one of its captions.

    Batches of the set are (images, B lists of captions).
    """

    kind: ClassVar[str] = "retrieval"
    result = RetrievalResult
    wording = TaskWording(
        main_metrics=("text_to_image_recall@5", "image_to_text_recall@5"),
        labels={
            "text_to_image_recall@#": "text → image R@#",
            "image_to_text_recall@#": "image → text R@#",
            "mean_recall": "mean recall",
        },
        headline="finds the right picture among its first five for {hits} of {n} captions",
    )
    in_averages = True

    def predict(self, encoder: SetEncoder, eval_set: EvaluationSet, targets: None) -> Predicted[RetrievalResult]:
        """Ranks in both directions.

        Raises: DataError for an empty set or an image without a caption; NumericalError for features not finite.
        """
        from evatool.eval.tasks.retrieval_features import encode_pairs, retrieve

        features = encode_pairs(encoder, eval_set)
        result = retrieve(features, device=encoder.device)
        return Predicted(result, gallery=lambda: make_gallery(encoder.name, eval_set, features, result))

    def counts(self, eval_set: Any) -> dict[str, int | None]:
        """Images and captions, with repetitions."""
        captions = sum(len(eval_set.samples.captions(i)) for i in range(eval_set.num_samples))
        return super().counts(eval_set) | {"captions": captions}


def make_gallery(model: str, eval_set: Any, features: PairFeatures, result: RetrievalResult) -> Gallery:
    """The clearest hits and misses in both directions, with their images.

    Args:
        eval_set: as `open_eval_set` gives it.
    """
    from evatool.eval.tasks.retrieval_examples import best_and_worst_retrievals

    chosen = [best_and_worst_retrievals(features, result, direction=direction) for direction in DIRECTIONS]
    best = [example for some, _ in chosen for example in some]
    worst = [example for _, some in chosen for example in some]
    return build_gallery(
        model,
        eval_set.name,
        best,
        worst,
        images={i: eval_set.image(i) for i in sorted(needed_images([*best, *worst]))},
        captions=features.captions,
        num_images=len(features.image),
    )
