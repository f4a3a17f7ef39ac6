"""The contract of an evaluation task: one kind of question that a model is asked on a set. No torch.

A new kind is one file with one class. `evatool compare` and the suites read these files too, so those of this package
import torch inside the functions that run a model; a task of your own may import it at the top.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from evatool.eval.predictions import Predictions
from evatool.eval.report.class_accuracy import ClassPanel
from evatool.eval.report.gallery import Gallery, MissedImage
from evatool.eval.task_wording import TaskWording

if TYPE_CHECKING:
    from evatool.eval.encoder import EvaluationSet, SetEncoder

P = TypeVar("P", bound=Predictions)


@dataclass(frozen=True)
class Predicted(Generic[P]):
    """One model's predictions on a set, and what can only be shown while its features are in memory.

    Attributes:
        gallery: makes examples to keep beside the predictions; called on one rank. None where there are none.
    """

    predictions: P
    gallery: Callable[[], Gallery] | None = None


@dataclass(frozen=True)
class Examples:
    """Classes and images that a report shows of a model's predictions on a set, besides numbers."""

    classes: ClassPanel | None = None
    missed: Sequence[MissedImage] = field(default_factory=tuple)


class EvalTask(ABC, Generic[P]):
    """One kind of evaluation: what a model is asked on a set, and how its predictions are measured and worded.

    `run` calls `open_targets` once and hands what it gives to `predict`. Neither knows of ranks: the `SetEncoder`
    divides the work, keeps the ranks in lockstep and returns arrays of the whole set on all of them. Metrics, what each
    averages and its chance belong to the predictions, as does the form in which they are stored.
    """

    kind: ClassVar[str]
    """Name of the kind, in suites, in `dataset_type.txt` and in `results.json`."""
    result: ClassVar[type[Predictions]]
    """Class of the predictions."""
    wording: ClassVar[TaskWording]
    """Words for metrics, headlines and tables."""
    in_averages: ClassVar[bool] = False
    """True if a suite's averages take in sets of this kind that they do not name."""
    takes_probes: ClassVar[bool] = False
    """True if every sample has one class id, so that probes can be fitted on the set's training data."""

    @abstractmethod
    def predict(self, encoder: SetEncoder, eval_set: EvaluationSet, targets: Any) -> Predicted[P]:
        """Predictions of the whole set, the same on every rank; every rank must call it.

        Args:
            encoder: the model. `over_batches` hands each batch's features to a function of the task and returns the
                arrays of all samples; `encode_images` returns all features. A sample that is several images is
                reduced as the `reduction` given to them says.
            targets: what `open_targets` gave.
        Raises: DataError for a set that cannot be measured; NumericalError for features that are not finite.
        """

    def open_targets(self, encoder: SetEncoder, eval_set: EvaluationSet) -> Any:
        """Targets that all samples are matched with, made once before the first batch; every rank must call it.

        A task that names classes returns its text classifier here. None unless overridden: targets that belong to one
        sample (its label, captions or mask) come with the batches of the set.
        """
        return None

    def run(self, encoder: SetEncoder, eval_set: EvaluationSet) -> Predicted[P]:
        """Open the targets, then predict; every rank must call it."""
        return self.predict(encoder, eval_set, self.open_targets(encoder, eval_set))

    def counts(self, eval_set: Any) -> dict[str, int | None]:
        """Samples, classes and captions of an opened set, None where they do not apply, as a suite states them.

        Args:
            eval_set: as `open_eval_set` gives it.
        """
        return {"pictures": eval_set.num_samples, "classes": len(eval_set.classnames) or None, "captions": None}

    def examples(self, predictions: P, eval_set: Any, title: str) -> Examples:
        """Classes and images that a report shows of kept predictions; none unless overridden.

        Args:
            eval_set: as `open_eval_set` gives it: names, keys and images by position.
            title: of the set, in the report.
        """
        return Examples()
