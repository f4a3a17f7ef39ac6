"""A job's operations and memory.

Source: docs/reference/memory-and-scale.md#operations, #states, #activations and #memory-of-the-loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evatool.plan import memory as mem
from evatool.plan import towers
from evatool.plan.costs import Costs, PartCost, step_costs
from evatool.plan.engines import States, average_bytes, engine_buffers, states
from evatool.plan.job import PlannedJob
from evatool.plan.locked import frozen_params

# ------------------------------------------------------------------------------------------------------- operations


@dataclass(frozen=True)
class Operations:
    """Floating-point operations a sample: forward passes by part, and what a step does with them.

    Attributes:
        image: forward passes of the image tower, a masked one among them.
        text: forward pass of the text tower.
        teacher: forward passes of all teachers that run.
        model: three forward passes of what learns, one of what is frozen and of the teachers: what utilisation (MFU) is
            counted on.
        executed: `model`, and the forward passes that are repeated to save memory.
    """

    image: int
    text: int
    teacher: int
    model: int
    executed: int


def operations(job: PlannedJob) -> Operations:
    """Operations a sample of this job."""
    costs = step_costs(job.step)
    forward = sum(part.forward for part in costs.parts)
    repeated = sum(part.forward - part.forward_only for part in costs.parts) if job.checkpointing == "full" else 0
    if job.accumulation > 1 and job.stage != "pretrain-mim":  # features of the whole batch first, then again
        repeated += forward
    return Operations(
        image=costs.forward("image", "mim"),
        text=costs.forward("text"),
        teacher=sum(teacher.forward for teacher in costs.teachers),
        model=costs.flops,
        executed=costs.flops + repeated,
    )


# ----------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank at the worst moment of a step; `total` includes what the allocator cannot use.

    Attributes:
        parts: by what they are for.
        host: in the machine's own memory.
    """

    parts: dict[str, int]
    host: int = 0

    @property
    def total(self) -> int:
        """All parts, and fragmentation."""
        return int(sum(self.parts.values()) * mem.FRAGMENTATION)


def memory(job: PlannedJob) -> RankMemory:
    """Memory of one rank at the worse of two moments: the end of the forward pass, with the loss; and the backward
    pass, with all gradients and the block that is computed again."""
    numerics, setup = mem.NUMERICS[job.numerics], job.setup
    params = towers.count_parameters(job.model).total
    own, average = rank_states(job), _average(job)
    costs = step_costs(job.step, numerics, checkpointing=job.checkpointing)
    stacks = [stack for part in costs.parts for stack in part.blocks]
    in_blocks = sum(stack.params for stack in stacks)
    batch = job.micro_batch_size
    kept = batch * sum(part.activations.kept for part in costs.parts)
    is_recomputed = job.checkpointing != "none"
    # What is recomputed casts its weights again, a block at a time; otherwise the casts wait for the backward pass.
    casts = 0 if is_recomputed else mem.cast_weights(_cast_params(costs.parts), numerics)
    always = {
        "weights": own.weights,
        "optimizer": own.optimizer,
        "average": average[0],
        "teacher": _teacher_bytes(costs, batch),
        "buffers": mem.model_buffers(job.model)
        + engine_buffers(params, max(stack.block_params for stack in stacks), params - in_blocks, setup, numerics),
        "context": int(mem.CONTEXT_BYTES),
    }
    loss = _loss_bytes(job, numerics)
    # DistributedDataParallel's gradients are its buckets, which stay; elsewhere earlier passes' are there already.
    has_gradients = job.engine == "ddp" or setup.accumulates
    forward = {"weight copies": casts, "activations": kept, "gradients": own.gradients if has_gradients else 0}
    if job.accumulation == 1 or job.stage == "pretrain-mim":
        forward |= {"loss": loss}
    backward = {
        "gradients": own.gradients,
        "activations": kept,
        "weight copies": casts,
        "recomputed block": batch * max(part.activations.block for part in costs.parts),
    }
    alone = {
        "loss": loss,
        "gradients": own.gradients if has_gradients else 0,
    }  # of features without their graph
    moments = [RankMemory(_in_order(always | moment), own.host + average[1]) for moment in (forward, backward, alone)]
    return max(moments, key=lambda moment: moment.total)


_PARTS = ("weights", "gradients", "optimizer", "average", "weight copies", "activations", "loss", "recomputed block")


def _in_order(parts: dict[str, int]) -> dict[str, int]:
    return {name: parts.get(name, 0) for name in (*_PARTS, "teacher", "buffers", "context")}


def learned_params(job: PlannedJob) -> int:
    """Parameters that have gradients and moments."""
    return towers.count_parameters(job.model).total - frozen_params(job.model, job.locks)


def rank_states(job: PlannedJob) -> States:
    """Weights, gradients and moments on one rank."""
    frozen = frozen_params(job.model, job.locks)
    return states([learned_params(job)], job.setup, mem.NUMERICS[job.numerics], [frozen] if frozen else ())


def _average(job: PlannedJob) -> tuple[int, int]:
    if not job.averages:
        return 0, 0
    return average_bytes([learned_params(job)], job.setup, [frozen_params(job.model, job.locks)])


def _cast_params(parts: Sequence[PartCost]) -> int:
    """Entries of the matrices that autocast keeps copies of: only of weights that learn."""
    found = 0
    for part in parts:
        for number, stack in enumerate(part.blocks):
            found += (stack.depth - (part.idle_blocks if number == 0 else 0)) * stack.matrix_params
    return found


def _loss_bytes(job: PlannedJob, numerics: mem.Numerics) -> int:
    """Bytes of a contrastive loss, which is taken over all micro-batches at once."""
    if job.stage == "pretrain-mim":
        return 0
    batch = job.micro_batch_size * job.accumulation
    width = job.model.embed_dim or 0
    found = mem.contrastive_bytes(batch, batch * job.num_gpus, width, numerics, teacher_widths=job.teacher_widths)
    if job.joint is None or job.accumulation == 1:
        return found
    # Predictions, their gradient and targets of all micro-batches, which wait for the loss.
    return found + 3 * batch * job.masked * (job.joint.predict_dim or 0) * mem.FP32


def _teacher_bytes(costs: Costs, batch: int) -> int:
    """Whole float32 weights of all teachers on every rank, the one at work, and the targets."""
    weights = sum(mem.FP32 * teacher.params for teacher in costs.teachers)
    working = max((batch * teacher.working_bytes for teacher in costs.teachers), default=0)
    targets = sum(batch * teacher.target_numbers * mem.FP32 for teacher in costs.teachers)
    return weights + working + targets
