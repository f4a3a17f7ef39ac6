"""One optimiser step's gradients from batches that do not fit at once, equal to those of the whole batch.

Source: GradCache (arXiv 2101.06983). Parity: tests/train/test_micro_batches.py, tests/dist/test_small_batches.py.
"""

# b this rank's samples of a step, m of a micro-batch, K = b / m micro-batches

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from evatool.core.batch import Batch, LossDict
from evatool.core.errors import RecipeError
from evatool.core.step import StepContext
from evatool.distributed.engines.amp import poisoned_if_not_finite
from evatool.distributed.engines.build import Engine
from evatool.objective.base import START, FeatureObjective, Objective, SumObjective, surrogate_loss

LossGate = Callable[[Tensor], Tensor]
"""A step's loss -> the factor on its gradient: 1, or NaN where the step is to be skipped on every rank."""


def forward_backward(
    engine: Engine,
    objective: Objective,
    batch: Batch,
    step: StepContext = START,
    *,
    micro_batch_size: int,
    seed: int,
    gate: LossGate,
    draw: Callable[[Batch], None] = lambda chunk: None,
) -> LossDict:
    """Losses of one step, detached, with their gradients in the engine; every rank calls it.

    A `FeatureObjective` keeps all samples of the batch as negatives: features of every micro-batch, the loss between
    all of them once, then every micro-batch with its features' gradients. The last one keeps its graph from the first
    pass, so there are K - 1 forward passes more than in a batch taken whole. Both passes of a micro-batch draw the
    same random numbers, so dropout hits the same numbers. The gradients of a `SumObjective` are added up by the
    micro-batches' shares of its loss.

    Args:
        step: where the run stands, for the objective.
        micro_batch_size: samples of this rank that go through the model at once; divides the batch.
        seed: of this step's random numbers on this rank.
        draw: prepares what is drawn by sample, before each pass over these samples.
        gate: sees the step's loss before its gradient is taken.
    Raises: RecipeError where the batch is to be split and the objective can only take it whole.
    """
    size = len(batch.keys)
    chunks = [batch.rows(slice(first, first + micro_batch_size)) for first in range(0, size, micro_batch_size)]
    if len(chunks) == 1:
        torch.manual_seed(seed)
        draw(batch)
        losses = engine.forward(batch, step=step)
        engine.backward(losses["loss"] * gate(losses["loss"].detach()))
        return {name: loss.detach() for name, loss in losses.items()}
    seeds = [(seed + 0x9E3779B97F4A7C15 * (number + 1)) & (2**63 - 1) for number in range(len(chunks))]
    match objective:
        case FeatureObjective():
            return _features_first(engine, objective, batch, step, chunks, seeds, gate, draw)
        case SumObjective():
            return _by_shares(engine, objective, step, chunks, seeds, gate, draw)
        case _:
            raise RecipeError(
                f"{type(objective).__name__} takes a batch whole, but {size} samples are to go through it in "
                f"{len(chunks)} parts",
                where="train.micro_batch_size",
                expected=f"{size}, or an objective derived from FeatureObjective or SumObjective",
                fix="leave train.micro_batch_size out",
            )


def _features_first(
    engine: Engine,
    objective: FeatureObjective,
    batch: Batch,
    step: StepContext,
    chunks: Sequence[Batch],
    seeds: Sequence[int],
    gate: LossGate,
    draw: Callable[[Batch], None],
) -> LossDict:
    """Losses of the whole batch L(f_1, ..., f_K), and their gradient by the chain rule through each f_k in turn.

    First pass:   f_k = encode(chunk k), without graph but for the last        K forward passes
    Loss:         g_k = dL/df_k, from all features at once                     one loss, its collectives once
    Second pass:  d/dw sum(g_k f_k(w)) for each chunk, added up                K backward, K - 1 forward passes
    """
    first_pass: list[dict[str, Tensor]] = []
    for number, (chunk, seed) in enumerate(zip(chunks, seeds, strict=True), start=1):
        torch.manual_seed(seed)
        draw(chunk)
        is_last = number == len(chunks)
        with nullcontext() if is_last else torch.no_grad(), engine.no_sync():
            first_pass.append(engine.forward(chunk, step=step, part="features"))
    kept = first_pass[-1]
    leaves = {
        name: _joined(name, first_pass).detach().requires_grad_(feature.requires_grad) for name, feature in kept.items()
    }
    whole = chunks[0].rows(slice(0, 0))  # the loss looks at no image and no text
    whole.caption_id = None if batch.caption_id is None else batch.caption_id.to(engine.device, non_blocking=True)
    losses = objective.losses(leaves, whole, step)
    learned = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    loss = poisoned_if_not_finite(losses["loss"]) * gate(losses["loss"].detach())
    found = torch.autograd.grad(loss, list(learned.values()), allow_unused=True)
    grads = {name: grad for name, grad in zip(learned, found, strict=True) if grad is not None}

    size = len(chunks[0].keys)
    slices = [slice(first, first + size) for first in range(0, len(batch.keys), size)]
    of_last = {name: grad if grad.dim() == 0 else grad[slices[-1]] for name, grad in grads.items()}
    with engine.no_sync():  # its graph is there already; the scalars' gradient goes with it
        engine.backward(surrogate_loss(kept, of_last))
    for number, (chunk, seed, rows) in enumerate(zip(chunks[:-1], seeds, slices, strict=False), start=1):
        of_chunk = {name: grad[rows] for name, grad in grads.items() if grad.dim() > 0}
        torch.manual_seed(seed)
        draw(chunk)
        with nullcontext() if number == len(chunks) - 1 else engine.no_sync():
            engine.backward(engine.forward(chunk, step=step, part="encoding", gradients=of_chunk)["loss"])
    return {name: loss.detach() for name, loss in losses.items()}


def _joined(name: str, parts: Sequence[dict[str, Tensor]]) -> Tensor:
    """One feature of the whole batch; scalars are the same in every part."""
    return parts[0][name] if parts[0][name].dim() == 0 else torch.cat([part[name] for part in parts])


def _by_shares(
    engine: Engine,
    objective: SumObjective,
    step: StepContext,
    chunks: Sequence[Batch],
    seeds: Sequence[int],
    gate: LossGate,
    draw: Callable[[Batch], None],
) -> LossDict:
    shares = objective.shares(chunks)
    sums: LossDict = {}
    for number, (chunk, seed, share) in enumerate(zip(chunks, seeds, shares, strict=True), start=1):
        torch.manual_seed(seed)
        draw(chunk)
        is_last = number == len(chunks)
        with nullcontext() if is_last else engine.no_sync():
            losses = engine.forward(chunk, step=step)
            for name, value in losses.items():
                weighted = value.detach() * (share if name == "loss" else 1 / len(chunks))
                sums[name] = weighted + sums[name] if name in sums else weighted
            # The whole loss is known with the last part; where it closes the gate, that part's gradient says so.
            passed = gate(sums["loss"]) if is_last else 1.0
            engine.backward(losses["loss"] * share * passed)
    return sums
