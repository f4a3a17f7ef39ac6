"""A loaded model as evaluation tasks call it: sets go in, features in the order of the set come out on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evatool.distributed import collectives
from evatool.eval.encode import (
    ClipModel,
    Encoding,
    ImageMemory,
    ImageReduction,
    Tokenizer,
    encode_texts,
    image_batches,
)
from evatool.eval.lockstep import fail_on_all_ranks, gather_arrays, gather_rows, own_indices
from evatool.eval.text_classifier import TensorStore, text_classifier

# B samples of a batch, N samples of the set, K patches, T texts, C classes, E embedding


class EvaluationSet(Protocol):
    """An opened set; its loader can be iterated more than once and keeps its order."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str:
        """The `kind` of the task that reads it."""
        ...

    @property
    def classnames(self) -> list[str]: ...
    @property
    def templates(self) -> list[str]:
        """Prompts with `{c}` where the class name goes."""
        ...

    @property
    def loader(self) -> Iterable[Any]:
        """Batches (images, targets): images as `Images`, targets as the task reads them, one a sample.

        Over several ranks it gives this rank's share, with `indices` (n,) the positions of its samples in the set.
        """
        ...


@dataclass
class SetEncoder:
    """One model, and how it is run, for the length of one set; every rank has one and calls the same methods.

    Attributes:
        name: of the model, for messages and examples.
        patch_tokens: images (B, 3, S, S) as projected patch tokens (B, K, E); None where the model gives none.
        stores: text classifiers of this model that are kept, see `text_classifier`.
        memory: features of images that were seen in other sets; None to keep nothing.
        on_batch: called with the number of samples after each batch.
    """

    model: ClipModel
    tokenizer: Tokenizer
    how: Encoding = field(default_factory=Encoding)
    name: str = "the model"
    patch_tokens: Callable[[Tensor], Tensor] | None = None
    stores: Sequence[TensorStore] = ()
    memory: ImageMemory | None = None
    on_batch: Callable[[int], None] | None = None

    @property
    def device(self) -> str:
        """Where the model is, and where features of a batch are."""
        return self.how.device

    def text_classifier(self, eval_set: EvaluationSet) -> Tensor:
        """(E, C) float32: the mean of each class's prompts' features. Raises: DataError for prompts of no use."""
        return text_classifier(
            self.model,
            self.tokenizer,
            eval_set.classnames or [],
            eval_set.templates or [],
            self.how,
            name=eval_set.name,
            stores=self.stores,
        )

    def encode_texts(self, texts: Sequence[str], *, where: str) -> Tensor:
        """(T, E) unit features in float32 on the CPU, in the order of `texts`."""
        return encode_texts(self.model, self.tokenizer, texts, self.how, where=where)

    def encode_images(
        self,
        eval_set: EvaluationSet,
        *,
        check: Callable[[Any], None] | None = None,
        reduction: ImageReduction = "mean",
    ) -> tuple[Tensor, list[Any]]:
        """(N, E) unit features of the whole set in float32 on the CPU, and the target of each sample.

        Args:
            check: called with each batch's targets before the model runs; raises for those that cannot be used.
        """
        rows: list[Tensor] = []
        targets: list[Any] = []
        with fail_on_all_ranks():
            for features, own in self._batches(eval_set, self.model.encode_image, "image features", check, reduction):
                rows.append(features.cpu())
                targets += own.tolist() if isinstance(own, Tensor) else list(own)
        indices = own_indices(eval_set.loader, len(targets))
        parts = collectives.gather_objects(list(zip(indices.tolist(), targets, strict=True)))
        every = sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])
        features = gather_rows(torch.cat(rows) if rows else torch.zeros(0, 0), indices, len(every))
        return features, [target for _, target in every]

    def over_batches(
        self,
        eval_set: EvaluationSet,
        predict: Callable[[Any, Any], dict[str, NDArray[Any]]],
        *,
        check: Callable[[Any], None] | None = None,
        reduction: ImageReduction = "mean",
        encode: Callable[[Tensor], Tensor] | None = None,
        what: str = "image features",
    ) -> dict[str, NDArray[Any]]:
        """Arrays of the whole set, one row a sample in its order; empty for a set without samples.

        Args:
            predict: a batch's unit features and targets as arrays with one row a sample, by name.
            check: as in `encode_images`.
            reduction: of samples that are several images, see `image_batches`.
            encode: what the model is asked for in place of its image features, called `what` in messages.
        """
        parts: list[dict[str, NDArray[Any]]] = []
        with fail_on_all_ranks():
            for features, targets in self._batches(
                eval_set, encode or self.model.encode_image, what, check, reduction, remember=encode is None
            ):
                parts.append(predict(features, targets))
        own = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
        count = len(next(iter(own.values()))) if own else 0
        return gather_arrays(own, own_indices(eval_set.loader, count))

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """Counts of all ranks added up; every rank must call it and gets the sum."""
        return collectives.all_reduce_sum(x)

    def max_over_ranks(self, x: Tensor) -> Tensor:
        """The element-wise largest values of all ranks; every rank must call it and gets them."""
        return collectives.all_reduce_max(x)

    def _batches(
        self,
        eval_set: EvaluationSet,
        encode: Callable[[Tensor], Tensor],
        what: str,
        check: Callable[[Any], None] | None,
        reduction: ImageReduction,
        *,
        remember: bool = True,
    ) -> Iterator[tuple[Any, Any]]:
        """This rank's batches, counted by `on_batch` once they were used."""
        for features, targets in image_batches(
            encode,
            eval_set.loader,
            self.how,
            where=eval_set.name,
            what=what,
            check=check,
            memory=self.memory if remember else None,
            reduction=reduction,
        ):
            yield features, targets
            if self.on_batch:
                self.on_batch(len(targets))
