"""Text classifiers: for each class the mean of its prompts' features, built once and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from evatool.core.errors import DataError
from evatool.distributed import collectives
from evatool.eval.encode import ClipModel, Encoding, Tokenizer, text_batches

# C classes, T templates, E embedding


class TensorStore(Protocol):
    """Where classifiers of one model are kept."""

    def get(self, key: str) -> Tensor | None:
        """The tensor kept under that key; None where there is none, or it is damaged."""
        ...

    def put(self, key: str, value: Tensor) -> None:
        """Keep it; complete or not there."""
        ...


class ClassifierMemory(dict[str, Tensor]):
    """A store for as long as the process lives."""

    def put(self, key: str, value: Tensor) -> None:
        """Keep it."""
        self[key] = value


def prompts_hash(classnames: Sequence[str], templates: Sequence[str]) -> str:
    """SHA-256 of all prompts, class by class."""
    return hashlib.sha256(json.dumps([list(classnames), list(templates)]).encode()).hexdigest()


def text_classifier(
    model: ClipModel,
    tokenizer: Tokenizer,
    classnames: Sequence[str],
    templates: Sequence[str],
    how: Encoding,
    *,
    name: str,
    stores: Sequence[TensorStore] = (),
) -> Tensor:
    """(E, C) float32 on the model's device: the normalised mean of each class's normalised prompt features.

    Args:
        name: of the evaluation set, for messages.
        stores: looked through in this order; what is built is kept in all of them. Their keys are the prompts': a
            store must belong to one model and tokenizer.
    Raises: DataError for prompts that cannot be used; NumericalError for features that are not finite.
    Every rank must call it; each encodes its share of the prompts.
    """
    check_prompts(name, classnames, templates)
    key = prompts_hash(classnames, templates)
    found = [store.get(key) for store in stores]
    kept = next((value for value in found if value is not None), None)
    # ranks may see different files: all build, or none
    misses = collectives.all_reduce_sum(torch.tensor([float(kept is None)], device=how.device))
    if kept is None or float(misses) > 0:
        kept = _build(model, tokenizer, classnames, templates, how, name)
        found = [None] * len(found)
    for store, had in zip(stores, found, strict=True):
        if had is None:
            store.put(key, kept)
    return kept.to(how.device)


def _build(
    model: ClipModel,
    tokenizer: Tokenizer,
    classnames: Sequence[str],
    templates: Sequence[str],
    how: Encoding,
    name: str,
) -> Tensor:
    prompts = [template.format(c=classname) for classname in classnames for template in templates]
    sums: Tensor | None = None
    for numbers, features in text_batches(model, tokenizer, prompts, how, where=name):
        if sums is None:
            sums = _zeros(len(classnames), features)
        # float64, so that the order of the batches does not show
        sums.index_add_(0, (numbers // len(templates)).to(features.device), features.double())
    if collectives.world_size() > 1:
        widths = collectives.gather_objects(None if sums is None else sums.shape[1])
        width = next(w for w in widths if w is not None)
        sums = torch.zeros(len(classnames), width, dtype=torch.float64, device=how.device) if sums is None else sums
        sums = collectives.all_reduce_sum(sums)
    assert sums is not None
    return torch.nn.functional.normalize(sums / len(templates), dim=-1).float().T.contiguous()


def _zeros(num_classes: int, features: Tensor) -> Tensor:
    return torch.zeros(num_classes, features.shape[1], dtype=torch.float64, device=features.device)


def check_prompts(name: str, classnames: Sequence[str], templates: Sequence[str]) -> None:
    """Refuse prompts that would give a wrong number. Raises: DataError naming the file and the line."""
    if not classnames:
        raise DataError(
            f"evaluation set {name} has no class names",
            expected="one class name a line in classnames.txt, in the order of the class ids",
            fix=f"add classnames.txt to the folder of {name}, or set dataset_type.txt to retrieval",
        )
    if not templates:
        raise DataError(
            f"evaluation set {name} has no prompt templates",
            expected="one prompt a line with {c} for the class name, such as: a photo of a {c}.",
            fix=f"add zeroshot_classification_templates.txt to the folder of {name}",
        )
    for number, template in enumerate(templates, start=1):
        where = f"zeroshot_classification_templates.txt, line {number}"
        if "{c}" not in template:
            raise DataError(
                f"prompt template {template!r} of {name} names no class",
                where=where,
                expected="{c} where the class name goes",
                fix="every class would get the same prompt: mend or remove the line",
            )
        try:
            template.format(c="")
        except (KeyError, IndexError, ValueError) as error:
            raise DataError(
                f"prompt template {template!r} of {name} has other braces than {{c}}",
                where=where,
                expected="{c} once or more, and no other braces",
                fix="write {{ and }} for braces that belong to the text",
            ) from error
