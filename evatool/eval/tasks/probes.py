"""Linear probe and few-shot classification on frozen features of a labelled training set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from evatool.core.errors import DataError
from evatool.eval.predictions import ScoreResult
from evatool.eval.task_wording import TaskWording
from evatool.eval.tasks.base import EvalTask, Predicted

if TYPE_CHECKING:
    from torch import Tensor

    from evatool.eval.encoder import EvaluationSet, SetEncoder
    from evatool.eval.text_classifier import TensorStore

# N samples, E embedding


@dataclass
class Probes(EvalTask[ScoreResult]):
    """Classifiers that are fitted on the features of a training set, beside the zero-shot predictions of a set.

    A suite's set names its training data instead of this kind, and a recipe asks for them.

    Attributes:
        training: a set as `open_eval_set` gives it, with the same classes as the set that is measured.
        linear_probe, few_shot: keyword arguments of the functions of that name; None leaves one out.
        seed: of what is held out and drawn.
        store: of features of this model's weights, arithmetic and transform; None to keep nothing.
    """

    kind: ClassVar[str] = "probes"
    result = ScoreResult
    wording = TaskWording(
        labels={"linear_probe_top1": "linear probe top-1", "few_shot_#_top#": "#-shot top-#"},
    )

    training: Any = None
    linear_probe: Mapping[str, Any] | None = None
    few_shot: Mapping[str, Any] | None = None
    seed: int = 0
    store: TensorStore | None = None

    def open_targets(self, encoder: SetEncoder, eval_set: EvaluationSet) -> tuple[Tensor, Tensor]:
        """Features and labels of the training set. Raises: DataError where its classes are others."""
        assert self.training is not None, "probes need a training set"
        if self.training.classnames != eval_set.classnames:
            raise DataError(
                f"probes of {eval_set.name} are trained on {self.training.name}, whose classes are others",
                expected="the same classnames.txt",
                fix="prepare both sets in one run",
            )
        return image_features(encoder, self.training, self.store)

    def predict(self, encoder: SetEncoder, eval_set: Any, targets: tuple[Tensor, Tensor]) -> Predicted[ScoreResult]:
        """Top-1 of each classifier, sample by sample."""
        from evatool.eval.tasks import logistic_regression as classifiers

        assert self.training is not None, "probes need a training set"
        test = image_features(encoder, eval_set, self.store)
        num_classes = len(eval_set.classnames)
        how: dict[str, Any] = {"seed": self.seed, "device": encoder.device}
        found = []
        if self.linear_probe is not None:
            found.append(classifiers.linear_probe(targets, test, num_classes, **how, **self.linear_probe))
        if self.few_shot is not None:
            name = self.training.name
            found.append(classifiers.few_shot(targets, test, num_classes, **how, name=name, **self.few_shot))
        scores = {metric: values for each in found for metric, values in each.scores.items()}
        chance = {metric: value for each in found for metric, value in each.chance.items()}
        return Predicted(ScoreResult(scores, chance))


def image_features(encoder: SetEncoder, eval_set: Any, store: TensorStore | None) -> tuple[Tensor, Tensor]:
    """Unit features (N, E) float32 and labels (N,) int64 of a set, on the CPU; every rank must call it.

    Args:
        eval_set: as `open_eval_set` gives it; its samples have a stamp that changes whenever a file of the set does.
        store: features are taken from it, and kept in it, by the set's stamp; None to keep nothing.
    """
    import torch

    key = eval_set.samples.stamp
    if store is not None and (kept := store.get(key)) is not None:
        return kept[:, :-1].float().contiguous(), kept[:, -1].long()
    features, targets = encoder.encode_images(eval_set)
    labels = torch.tensor(targets, dtype=torch.int64)
    if store is not None:
        store.put(key, torch.cat([features, labels[:, None].float()], dim=1))
    return features, labels
