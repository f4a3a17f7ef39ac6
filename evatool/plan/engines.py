"""What each engine keeps on a rank: weights, gradients, optimiser states, and the buffers that it works with.

Held to running engines on 2 and 4 ranks by tests/dist/test_plan_states.py. Source: evatool/distributed; DeepSpeed
0.19's defaults; docs/reference/memory-and-scale.md#states.
"""

# P parameters, N ranks

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from evatool.plan.memory import FP32, Numerics

Kind = Literal["single", "ddp", "fsdp2", "deepspeed"]
Offload = Literal["none", "optimizer", "optimizer-and-weights"]

ZERO_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default `reduce_bucket_size`: allocated whole, however small the model is."""
ZERO_LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's default `stage3_max_live_parameters`."""


@dataclass(frozen=True)
class Setup:
    """One engine on a number of ranks.

    Attributes:
        kind: as recipes name the engine; "deepspeed" goes with `zero_stage`, the others leave that at 0.
        offload: what DeepSpeed keeps in the machine's own memory.
        accumulates: several backward passes a step.
        on_gpu: DeepSpeed takes a second bucket there, to reduce one while the other fills.
    """

    kind: Kind
    zero_stage: int = 0
    offload: Offload = "none"
    num_ranks: int = 1
    accumulates: bool = False
    on_gpu: bool = True

    @property
    def shards_nothing(self) -> bool:
        """Whether every rank holds all of it."""
        return self.kind in ("single", "ddp") or (self.kind == "deepspeed" and self.zero_stage == 0)

    @property
    def shards_weights(self) -> bool:
        """Whether weights have to be gathered to be used."""
        return self.kind == "fsdp2" or (self.kind == "deepspeed" and self.zero_stage == 3)


@dataclass(frozen=True)
class States:
    """Bytes on one rank of what lives as long as the run, and of the gradients at their largest.

    `host` is in the machine's own memory, all else on the accelerator.
    """

    weights: int
    gradients: int
    optimizer: int
    host: int = 0

    @property
    def total(self) -> int:
        """All on the accelerator."""
        return self.weights + self.gradients + self.optimizer


def states(sizes: Sequence[int], setup: Setup, numerics: Numerics, frozen: Sequence[int] = ()) -> States:
    """Weights, gradients, and AdamW's or LAMB's moments with the master weights, of the rank that holds most.

    Args:
        sizes: parameters of each optimiser group; under ZeRO-3 of each tensor; one sum will do where padding does not
            matter. `fsdp2_states` has fsdp2's padding.
        frozen: of each tensor that does not learn: weights alone, divided where weights are.
    """
    if frozen:
        learned, ranks = states(sizes, setup, numerics), setup.num_ranks if setup.shards_weights else 1
        weights = numerics.weight * sum(-(-n // ranks) for n in frozen)
        if setup.offload == "optimizer-and-weights":
            return replace(learned, host=learned.host + weights)
        return replace(learned, weights=learned.weights + weights)
    params, size = sum(sizes), numerics.weight
    if setup.kind == "fsdp2":
        return fsdp2_states([(params,)], setup, numerics)
    master = FP32 if size != FP32 else 0  # float32 weights are their own master where nothing is divided
    if setup.shards_nothing:
        return States(size * params, size * params, (2 * FP32 + master) * params)
    # Stages 1 and 2 divide groups, padded to an even number of elements a rank; stage 3 divides each parameter.
    stage, ranks = setup.zero_stage, setup.num_ranks
    even = 1 if stage == 3 else 2
    piece = sum(even * -(-n // (even * ranks)) for n in sizes)
    # ZeRO keeps a master copy of its piece even of float32 weights. Stage 1 has whole gradients until they are reduced.
    optimizer = 3 * FP32 * piece
    weights = size * piece if stage == 3 else size * ranks * piece
    gradients = size * params if stage == 1 else size * piece
    if setup.offload == "none":
        return States(weights, gradients, optimizer)
    # Gradients are stepped where the master weights are; stage 3 collects them there in a buffer of their own first.
    host = optimizer + (2 if stage == 3 else 1) * FP32 * piece
    on_gpu = 0 if stage == 3 else gradients
    if setup.offload == "optimizer-and-weights":
        return States(0, on_gpu, 0, host + weights)
    return States(weights, on_gpu, 0, host)


def average_bytes(sizes: Sequence[int], setup: Setup, frozen: Sequence[int] = ()) -> tuple[int, int]:
    """A moving average of the weights (`train.ema_decay`) on the first rank, which holds most: (accelerator, host).

    Each rank averages the float32 numbers it holds; what every rank has, the first averages alone. Master weights are
    averaged where they are, so an offloaded optimiser has its average in the machine's own memory.

    Args:
        sizes, frozen: as in `states`.
    """
    ranks = setup.num_ranks
    whole_frozen = FP32 * sum(frozen)
    if setup.shards_nothing:
        return FP32 * sum(sizes) + whole_frozen, 0
    even = 2 if setup.kind == "deepspeed" and setup.zero_stage < 3 else 1
    own = FP32 * sum(min(n, even * -(-n // (even * ranks))) for n in sizes)
    if setup.shards_weights:
        whole_frozen = FP32 * sum(-(-n // ranks) for n in frozen)
    if setup.offload == "none":
        return own + whole_frozen, 0
    return (0, own + whole_frozen) if setup.offload == "optimizer-and-weights" else (whole_frozen, own)


def fsdp2_states(shapes: Sequence[tuple[int, ...]], setup: Setup, numerics: Numerics, rank: int = 0) -> States:
    """What `fully_shard` leaves on a rank: rows of each parameter, padded to as many as the first rank has.

    Weights are float32 and their own master, so this is 4 bytes a parameter less than ZeRO-3. Where several backward
    passes add up, gradients stay whole until the last of them.

    Args:
        shapes: of each parameter.
        rank: whose; the first holds most.
    """
    ranks, size = setup.num_ranks, numerics.weight
    padded = own = 0
    for shape in shapes:
        axis = sharded_axis(shape, ranks)
        rows = shape[axis]
        each, row_size = -(-rows // ranks), math.prod(shape) // rows
        padded += each * row_size
        own += max(0, min(each, rows - rank * each)) * row_size
    master = FP32 if size != FP32 else 0
    gradients = size * padded
    if setup.accumulates:
        gradients += size * sum(math.prod(shape) for shape in shapes)
    return States(size * padded, gradients, (2 * FP32 + master) * own)


def sharded_axis(shape: Sequence[int], num_ranks: int) -> int:
    """Axis whose rows are divided: the first, or the first longer than 1 where it divides."""
    axis = next((axis for axis, size in enumerate(shape) if size > 1), 0)
    return axis if axis > 0 and shape[axis] % num_ranks == 0 else 0


def zero_buckets(setup: Setup, numerics: Numerics) -> int:
    """Bytes of DeepSpeed's buckets of gradients on their way, which are there from the first backward pass on."""
    if setup.kind != "deepspeed" or setup.zero_stage == 0:
        return 0
    num_buckets = 2 if setup.zero_stage == 2 and setup.on_gpu else 1  # overlap_comm
    return num_buckets * numerics.weight * ZERO_BUCKET_ELEMENTS


def engine_buffers(params: int, block_params: int, root_params: int, setup: Setup, numerics: Numerics) -> int:
    """Buckets, and weights that are gathered: an upper bound. DistributedDataParallel's buckets are its gradients.

    Args:
        params: all of them.
        block_params: of the largest transformer block.
        root_params: outside of blocks.
    """
    size = numerics.weight
    if setup.kind == "fsdp2":
        # A block at work and the next one with the buffer it comes in; a block's gradients and the copy that is sent.
        # What stands outside of blocks stays gathered from the forward pass to the end of the backward pass.
        return size * (min(5 * block_params, 2 * params) + 2 * root_params)
    if setup.kind == "deepspeed" and setup.zero_stage == 0 and setup.num_ranks > 1:
        return size * min(params, ZERO_BUCKET_ELEMENTS)  # a flat copy of each bucket
    if not (setup.kind == "deepspeed" and setup.zero_stage == 3):
        return zero_buckets(setup, numerics)
    # two blocks with their gradients, or what DeepSpeed is allowed to keep gathered
    return zero_buckets(setup, numerics) + size * min(params, max(4 * block_params, ZERO_LIVE_ELEMENTS))
