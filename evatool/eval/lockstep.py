"""Work that is divided over ranks: every rank goes through the same number of passes and fails with the others.

Tasks of `evatool/eval/tasks/` call none of this: their batches, and what comes of them, pass through `SetEncoder`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evatool.core.errors import EvatoolError
from evatool.distributed import collectives

# N samples of the set, n of this rank, E embedding


@contextmanager
def fail_on_all_ranks() -> Iterator[None]:
    """Work that may fail on one rank: then it fails on all, instead of leaving the others waiting.

    Every rank must enter and leave it. Raises: the rank's own exception, or EvatoolError in another rank's words.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if collectives.world_size() > 1:
        messages = collectives.gather_objects(None if failure is None else f"{type(failure).__name__}: {failure}")
        others = [f"rank {rank}: {message}" for rank, message in enumerate(messages) if message is not None]
        if failure is None and others:
            raise EvatoolError(others[0])
    if failure is not None:
        raise failure


def stepped_batches(
    loader: Any,
    forward: Callable[[Any], Any],
    made_up: Callable[[], None],
    *,
    lockstep: bool,
    check: Callable[[Any], None] | None = None,
) -> Iterator[tuple[Any, Any]]:
    """This rank's batches as (`forward(images)`, targets), one forward pass a batch.

    In lockstep, a rank that has fewer batches than another, or whose image cannot be read, goes on with `made_up`
    passes before it stops or raises: the others wait for it in every pass.

    Args:
        loader: yields (images, targets); its `most_batches`, where it has one, counts the batches of the rank that has
            the most.
        made_up: one forward pass whose result nobody looks at.
        check: called with a batch's targets before its forward pass.
    """
    failure: Exception | None = None
    done = 0
    with torch.no_grad():
        batches = iter(loader)
        while True:
            try:
                images, targets = next(batches)
                if check:
                    check(targets)
                done += 1
                features = forward(images)
            except StopIteration:
                break
            except Exception as error:
                failure = error
                break
            yield features, targets
        missing = getattr(loader, "most_batches", done) - done if lockstep else 0
        for _ in range(missing):  # a rank may have one batch less than another, or none where the set is tiny
            made_up()
    if failure is not None:
        raise failure


def own_indices(loader: Any, count: int) -> NDArray[np.int64]:
    """(count,) positions in the set of the samples that the loader gave; in order where it knows of no ranks."""
    indices = getattr(loader, "indices", None)
    return np.arange(count) if indices is None else indices


def gather_rows(rows: Tensor, indices: NDArray[np.int64], total: int) -> Tensor:
    """(N, E) rows of all ranks by their position; every rank must call it and gets all of them.

    Args:
        rows: (n, E) float32, this rank's.
        indices: (n,) which of the `total` rows they are; each position is on exactly one rank.
    """
    parts = collectives.gather_objects((indices, rows.numpy())) if collectives.world_size() > 1 else [(indices, rows)]
    first = next((r for own, r in parts if len(own)), None)
    if first is None:
        return torch.zeros(0, 0)
    out = torch.empty((total, first.shape[1]), dtype=torch.float32)
    seen = 0
    for own, values in parts:
        if len(own):
            out[torch.from_numpy(np.asarray(own))] = torch.as_tensor(values)
            seen += len(own)
    assert seen == total, f"{seen} rows came from the ranks instead of {total}"
    return out


def gather_arrays(arrays: dict[str, NDArray[Any]], indices: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Per-sample arrays of all ranks in the order of the set; every rank must call it and gets all of them."""
    if collectives.world_size() == 1:
        return arrays
    parts = collectives.gather_objects((indices, arrays))
    order = np.argsort(np.concatenate([own for own, _ in parts]), kind="stable")
    # a rank without samples has arrays of no width: it is left out
    names = next((list(found) for own, found in parts if len(own)), [])
    return {name: np.concatenate([found[name] for own, found in parts if len(own)])[order] for name in names}
