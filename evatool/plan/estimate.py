"""A job's operations and memory.

Source: docs/reference/memory-and-scale.md#operations, #states, #activations and #memory-of-the-loss.
"""

from __future__ import annotations

from dataclasses import dataclass

from evatool.plan import memory as mem
from evatool.plan import towers
from evatool.plan.engines import States, average_bytes, engine_buffers, states
from evatool.plan.job import Job
from evatool.plan.locked import forward_only_flops, frozen_params, idle_blocks

# ------------------------------------------------------------------------------------------------------- operations


@dataclass(frozen=True)
class Operations:
    """Floating-point operations a sample: forward passes by part, and what a step does with them."""

    image: int
    text: int
    teacher: int
    model: int
    """Three forward passes of what learns, one of what is frozen and of the teacher: what utilisation (MFU) is counted
    on."""
    executed: int
    """`model`, and the forward passes that are repeated to save memory."""


def operations(job: Job) -> Operations:
    """Operations a sample of this job."""
    image, text, teacher = 0, 0, 0
    if job.stage == "pretrain-mim":
        image = towers.mim_flops(job.model, job.masked)
        teacher = sum(towers.image_flops(config, all_tokens=True) for config in job.teachers)
    else:
        image = round(sum(part * towers.image_flops(job.model, share) for part, share in job.dropout_shares))
        text = towers.text_flops(job.model, job.text_tokens)
        if job.joint is not None:
            image += towers.mim_flops(job.joint, job.masked)
        for config in job.teachers:
            teacher += towers.image_flops(config, all_tokens=job.joint is not None)
            teacher += towers.text_flops(config, job.text_tokens) if job.joint is None else 0
    shares = job.dropout_shares if job.stage != "pretrain-mim" else []
    idle = round(sum(p * forward_only_flops(job.model, job.locks, share, job.text_tokens) for p, share in shares))
    model = 3 * (image + text) - 2 * idle + teacher
    repeated = image + text - idle if job.checkpointing == "full" else 0
    if job.accumulation > 1 and job.stage != "pretrain-mim":  # features of the whole batch first, then again
        repeated += image + text
    return Operations(image, text, teacher, model, model + repeated)


# ----------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Memory:
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


def memory(job: Job) -> Memory:
    """Memory of one rank at the worse of two moments: the end of the forward pass, with the loss; and the backward
    pass, with all gradients and the block that is computed again."""
    numerics, setup = mem.NUMERICS[job.numerics], job.setup
    params = towers.count_parameters(job.model).total
    held, average = held_states(job), _average(job)
    stacks, activations = _activations(job, numerics)
    in_blocks = sum(stack.params for stack in stacks)
    batch = job.micro_batch_size
    kept = batch * sum(part.kept for part in activations)
    is_recomputed = job.checkpointing != "none"
    # What is recomputed casts its weights again, a block at a time; otherwise the casts wait for the backward pass.
    casts = 0 if is_recomputed else mem.cast_weights(_cast_params(job, stacks), numerics)
    always = {
        "weights": held.weights,
        "optimizer": held.optimizer,
        "average": average[0],
        "teacher": _teacher_bytes(job, numerics, batch),
        "buffers": mem.model_buffers(job.model)
        + engine_buffers(params, max(stack.block_params for stack in stacks), params - in_blocks, setup, numerics),
        "context": int(mem.CONTEXT_BYTES),
    }
    loss = _loss_bytes(job, numerics)
    # DistributedDataParallel's gradients are its buckets, which stay; elsewhere earlier passes' are there already.
    has_gradients = job.engine == "ddp" or setup.accumulates
    forward = {"weight copies": casts, "activations": kept, "gradients": held.gradients if has_gradients else 0}
    if job.accumulation == 1 or job.stage == "pretrain-mim":
        forward |= {"loss": loss}
    backward = {
        "gradients": held.gradients,
        "activations": kept,
        "weight copies": casts,
        "recomputed block": batch * max(part.block for part in activations),
    }
    alone = {"loss": loss, "gradients": held.gradients if has_gradients else 0}  # of features without their graph
    moments = [Memory(_in_order(always | moment), held.host + average[1]) for moment in (forward, backward, alone)]
    return max(moments, key=lambda moment: moment.total)


_PARTS = ("weights", "gradients", "optimizer", "average", "weight copies", "activations", "loss", "recomputed block")


def _in_order(parts: dict[str, int]) -> dict[str, int]:
    return {name: parts.get(name, 0) for name in (*_PARTS, "teacher", "buffers", "context")}


def learned_params(job: Job) -> int:
    """Parameters that have gradients and moments."""
    return towers.count_parameters(job.model).total - frozen_params(job.model, job.locks)


def held_states(job: Job) -> States:
    """What lives as long as the run on one rank."""
    frozen = frozen_params(job.model, job.locks)
    return states([learned_params(job)], job.setup, mem.NUMERICS[job.numerics], [frozen] if frozen else ())


def _average(job: Job) -> tuple[int, int]:
    if not job.averages:
        return 0, 0
    return average_bytes([learned_params(job)], job.setup, [frozen_params(job.model, job.locks)])


def _cast_params(job: Job, stacks: list[towers.Blocks]) -> int:
    """Entries of the matrices that autocast keeps copies of: only of weights that learn."""
    idle = idle_blocks(job.model, job.locks) if job.stage != "pretrain-mim" else (0, 0)
    depths = [stack.depth - own for stack, own in zip(stacks, idle, strict=False)]
    depths += [stack.depth for stack in stacks[len(depths) :]]
    return sum(depth * stack.matrix_params for depth, stack in zip(depths, stacks, strict=True))


def _activations(job: Job, numerics: mem.Numerics) -> tuple[list[towers.Blocks], list[mem.Activations]]:
    """Each tower's blocks, and what it keeps of a sample."""
    stacks = [towers.image_blocks(job.model)]
    if job.stage == "pretrain-mim":
        if job.model.decoder is not None:
            stacks.append(towers.decoder_blocks(job.model))
        return stacks, [mem.mim_activations(job.model, numerics, job.masked, checkpointing=job.checkpointing)]
    idle = idle_blocks(job.model, job.locks)
    image = mem.image_activations(
        job.model,
        numerics,
        patch_dropout=job.least_dropout,
        checkpointing=job.checkpointing,
        idle_blocks=idle[0] if job.locks.visual is not None and job.model.is_eva else None,
        is_locked=job.locks.visual == "all",
    )
    text = mem.text_activations(
        job.model,
        numerics,
        tokens=job.text_tokens,
        checkpointing=job.checkpointing,
        idle_blocks=idle[1],
        is_locked=job.locks.text == "all",
    )
    found = [image, text]
    if job.joint is not None:
        found.append(mem.mim_activations(job.joint, numerics, job.masked, checkpointing=job.checkpointing))
    return [*stacks, towers.text_blocks(job.model)], found


def _loss_bytes(job: Job, numerics: mem.Numerics) -> int:
    """Of a contrastive loss, which is taken over all micro-batches at once."""
    if job.stage == "pretrain-mim":
        return 0
    batch = job.micro_batch_size * job.accumulation
    width = job.model.embed_dim or 0
    found = mem.contrastive_bytes(batch, batch * job.num_gpus, width, numerics, teacher_widths=job.teacher_widths)
    if job.joint is None or job.accumulation == 1:
        return found
    # Predictions, their gradient and targets of all micro-batches, which wait for the loss.
    return found + 3 * batch * job.masked * (job.joint.predict_dim or 0) * mem.FP32


def _teacher_bytes(job: Job, numerics: mem.Numerics, batch: int) -> int:
    """Whole float32 weights of all teachers on every rank, one block at work, and the targets."""
    weights, working, targets = 0, 0, 0
    for config in job.teachers:
        blocks, tokens = towers.image_blocks(config), 1 + towers.num_patches(config)
        weights += mem.FP32 * towers.count_parameters(config).total
        working = max(working, batch * mem.teacher_activations(blocks, tokens, numerics))
        rows = towers.num_patches(config) if job.masked else 2
        targets += batch * rows * (config.embed_dim or 0) * mem.FP32
    return weights + working + targets
