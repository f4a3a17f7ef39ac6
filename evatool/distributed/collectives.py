"""The few exchanges between ranks that training needs. At world size 1 each is free and needs no process group."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# b samples of this rank, W ranks, E features


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


_waited = [0.0]


def waited_sec() -> float:
    """Seconds this process has spent in the exchanges of this module, for telling a slow rank from its neighbours."""
    return _waited[0]


@contextmanager
def _timed() -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        _waited[0] += time.perf_counter() - start


class _AllGather(torch.autograd.Function):
    """Concatenate over ranks; backward adds up what every rank wants of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.num_rows = x.shape[0]
        everyone = x.new_empty(dist.get_world_size() * x.shape[0], *x.shape[1:])
        with _timed():
            dist.all_gather_into_tensor(everyone, x.contiguous())
        return everyone

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        if dist.get_backend() == "nccl":
            own = grads[0].new_empty(ctx.num_rows, *grads[0].shape[1:])
            dist.reduce_scatter_tensor(own, grads[0].contiguous())
            return own
        # gloo has no fast reduce-scatter; the features of a batch are small.
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        start = dist.get_rank() * ctx.num_rows
        return total[start : start + ctx.num_rows]


def all_gather_with_grad(x: Tensor) -> Tensor:
    """The rows of all ranks in rank order, with gradients to all of them; every rank must call it.

    The backward pass sums over ranks. So if the job's loss is the mean over ranks of each rank's loss (the rank's own
    rows against all columns, or the whole loss computed everywhere), the engine's mean of parameter gradients over
    ranks equals the gradient of the same loss in one process.

    Args:
        x: (b, ...), the same shape on every rank; integers pass too, without gradient.
    Returns: (W b, ...); `x` itself at world size 1.
    Source: mlfoundations/open_clip issues 980 and 1047 (gathers that drop the gradient). Test:
    tests/dist/test_gradients.py.
    """
    if world_size() == 1:
        return x
    every_row: Tensor = _AllGather.apply(x)
    return every_row


def all_gather_rows(x: Tensor) -> Tensor:
    """The rows of all ranks in rank order without gradient: (b, ...) -> (W b, ...); every rank must call it."""
    with torch.no_grad():
        return all_gather_with_grad(x)


def all_reduce_mean(x: Tensor) -> Tensor:
    """Mean over ranks, without gradient; every rank must call it."""
    if world_size() == 1:
        return x.detach()
    total = x.detach().clone()
    with _timed():
        dist.all_reduce(total)
    return total / world_size()


def all_reduce_max(x: Tensor) -> Tensor:
    """Largest value over ranks, element by element, without gradient; every rank must call it."""
    if world_size() == 1:
        return x.detach()
    largest = x.detach().clone()
    with _timed():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over ranks, without gradient; every rank must call it."""
    if world_size() == 1:
        return x.detach()
    total = x.detach().clone()
    with _timed():
        dist.all_reduce(total)
    return total


def around_ring(
    block: Sequence[Tensor], carried_state: Sequence[Tensor]
) -> Iterator[tuple[int, Sequence[Tensor], Sequence[Tensor]]]:
    """Every rank's block in turn, the own one first, without ever holding more than two; every rank must go through.

    Args:
        block: what the other ranks only read, of the same shapes on every rank. It is under way to the next rank while
            this one works with it.
        carried_state: travels with the block and is written to on the way, in place. Once round, each rank's comes
            home: these very tensors then hold what all ranks have written.
    Yields: the rank whose block it is, the block, and its carried state. No gradient flows.

    On four ranks, with the owner of the block that each rank works with:

        hop        0  1  2  3
        rank 0     0  3  2  1        blocks move to the next rank; carried state of rank 0 visits 0, 1, 2, 3
        rank 1     1  0  3  2        and is handed on once more, home
        rank 2     2  1  0  3
        rank 3     3  2  1  0
    """
    size, me = world_size(), rank()
    blocks, carried = list(block), list(carried_state)
    for hop in range(size):
        is_last = hop + 1 == size
        arriving = None if is_last else _pass_on(blocks, first_tag=0)
        yield (me - hop) % size, blocks, carried
        if size > 1:
            carried = _pass_on(carried, first_tag=len(blocks))()
        if arriving is not None:
            blocks = arriving()
    for own, home in zip(carried_state, carried, strict=True):
        if own is not home:
            own.copy_(home)


def _pass_on(tensors: Sequence[Tensor], first_tag: int) -> Callable[[], list[Tensor]]:
    """Start sending tensors to the next rank; the result waits for those of the rank before."""
    after, before = (rank() + 1) % world_size(), (rank() - 1) % world_size()
    sent = [tensor.contiguous() for tensor in tensors]
    received = [torch.empty_like(tensor) for tensor in sent]
    steps = []
    for tag, (there, here) in enumerate(zip(sent, received, strict=True), start=first_tag):
        steps += [dist.P2POp(dist.isend, there, after, tag=tag), dist.P2POp(dist.irecv, here, before, tag=tag)]
    works = dist.batch_isend_irecv(steps) if steps else []

    def wait() -> list[Tensor]:
        with _timed():
            for work in works:
                work.wait()
        del sent[:]  # kept until they have left
        return received

    return wait


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """Small Python values of all ranks in rank order (pickled by torch; for messages, not for tensors).

    Args:
        group: from `side_group`, where a thread of its own asks; its waiting is not this process's.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with _timed() if group is None else nullcontext():
        dist.all_gather_object(values, value, group=group)
    return values


def side_group() -> Any:
    """A second connection of all ranks, over gloo, for exchanges of a thread of its own; None at world size 1.

    Every rank must call it.
    """
    return dist.new_group(backend="gloo") if world_size() > 1 else None
