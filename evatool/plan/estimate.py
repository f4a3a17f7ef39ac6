"""A job on a kind of hardware: operations, memory, network, data, disk, time. Source: scale.md 2.2 to 2.5."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from evatool.plan import memory as mem
from evatool.plan import towers
from evatool.plan.hardware import Assumptions, Hardware
from evatool.plan.job import Job

Resource = Literal["memory", "compute", "network", "data", "storage"]

# ------------------------------------------------------------------------------------------------------- operations


@dataclass(frozen=True)
class Operations:
    """Floating-point operations a sample: forward passes by part, and what a step does with them."""

    image: int
    text: int
    teacher: int
    model: int
    """Three forward passes of what learns, one of the teacher: what utilisation (MFU) is counted on."""
    executed: int
    """`model`, and the forward passes that are repeated to save memory."""


def operations(job: Job) -> Operations:
    """Operations a sample of this job."""
    image, text, teacher = 0, 0, 0
    if job.stage == "pretrain-mim":
        image = towers.mim_flops(job.model, job.masked)
        if job.teacher is not None:
            teacher = towers.image_flops(job.teacher, all_tokens=True)
    else:
        image = towers.image_flops(job.model, job.patch_dropout)
        text = towers.text_flops(job.model, job.text_tokens)
        if job.teacher is not None:
            teacher = towers.image_flops(job.teacher) + towers.text_flops(job.teacher, job.text_tokens)
    model = 3 * (image + text) + teacher
    repeated = image + text if job.checkpointing else 0
    if job.accumulation > 1 and job.stage != "pretrain-mim":  # features of the whole batch first, then again
        repeated += image + text
    return Operations(image, text, teacher, model, model + repeated)


# ----------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at the worst moment of a step; `total` includes what the allocator cannot use."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All parts, and fragmentation."""
        return int(sum(self.parts.values()) * mem.FRAGMENTATION)


def memory(job: Job) -> Memory:
    """Memory of one rank.

    Gradients are counted beside all activations, which is a little more than any moment holds.
    """
    numerics, batch = mem.NUMERICS[job.numerics], job.micro_batch_size
    params = towers.count_parameters(job.model).total
    zero = {"is_zero": job.is_zero, "zero_stage": job.zero_stage, "num_ranks": job.num_gpus, "numerics": numerics}
    held = mem.states([params], **zero)  # type: ignore[arg-type]
    blocks = [towers.image_blocks(job.model)]
    if job.stage == "pretrain-mim":
        parts = [mem.mim_activations(job.model, numerics, job.masked, checkpointing=job.checkpointing)]
        loss = 0
    else:
        parts = [
            mem.image_activations(
                job.model, numerics, patch_dropout=job.patch_dropout, checkpointing=job.checkpointing
            ),
            mem.text_activations(job.model, numerics, tokens=job.text_tokens, checkpointing=job.checkpointing),
        ]
        blocks.append(towers.text_blocks(job.model))
        loss = mem.contrastive_bytes(
            batch * job.accumulation,  # the loss is taken over all micro-batches at once
            batch * job.num_gpus * job.accumulation,
            job.model.embed_dim or 0,
            numerics,
            distils=job.distils_logits,
        )
    recomputed = batch * max(part.block for part in parts)
    block_params = max(stack.block_params for stack in blocks)
    return Memory(
        {
            "weights": held.weights,
            "gradients": held.gradients,
            "optimizer": held.optimizer,
            "weight copies": mem.cast_weights(sum(s.depth * s.matrix_params for s in blocks), numerics),
            "activations": batch * sum(part.kept for part in parts),
            "loss": loss,
            "recomputed block": max(0, recomputed - loss),  # the loss is gone by then
            "teacher": _teacher_bytes(job, numerics, batch),
            "buffers": mem.engine_buffers(params, block_params, **zero),  # type: ignore[arg-type]
            "context": int(mem.CONTEXT_BYTES),
        }
    )


def _teacher_bytes(job: Job, numerics: mem.Numerics, batch: int) -> int:
    """Whole float32 weights on every rank, one block at work, and the targets."""
    if job.teacher is None:
        return 0
    blocks, tokens = towers.image_blocks(job.teacher), 1 + towers.num_patches(job.teacher)
    targets = towers.num_patches(job.teacher) if job.stage == "pretrain-mim" else 2
    working = batch * mem.teacher_activations(blocks, tokens, numerics)
    weights = mem.FP32 * towers.count_parameters(job.teacher).total
    return weights + working + batch * targets * (job.teacher.embed_dim or 0) * mem.FP32


# --------------------------------------------------------------------------------------------------- step and run


@dataclass(frozen=True)
class Traffic:
    """Bytes one rank exchanges in a step, the time that takes, and the part of it that no computation covers."""

    weights_and_gradients: int
    features: int
    seconds: float
    exposed_seconds: float

    @property
    def total(self) -> int:
        """Both kinds."""
        return self.weights_and_gradients + self.features


def traffic(job: Job, gpu: Hardware, compute_sec: float) -> Traffic:
    """Exchanges of one step; ring algorithms, bytes sent and received (scale.md 2.4)."""
    if job.num_gpus == 1:
        return Traffic(0, 0, 0.0, 0.0)
    params = towers.count_parameters(job.model).total * mem.NUMERICS[job.numerics].weight
    stage = job.zero_stage if job.is_zero else 0
    reduced = params if stage else 2 * params  # scattered only, or given to everyone
    gathered = {0: 0, 1: params, 2: params, 3: 2 * params * job.accumulation}[stage]
    features = 0
    if job.stage != "pretrain-mim":
        everyone = job.global_batch_size * (job.model.embed_dim or 0)
        # Gathered, both towers and their gradients; or round a ring: captions, then captions with their gradients.
        features = 4 * everyone * 2 if job.numerics == "bf16" else 3 * everyone * mem.FP32
    rate = 1e9 * (gpu.node_gb_per_sec if job.num_gpus <= gpu.gpus_per_node else gpu.fabric_gb_per_sec)
    # Stage 1 reduces after the backward pass; stages 1 and 2 gather the new weights after the step.
    behind_backward = {0: reduced, 1: 0, 2: reduced, 3: reduced + gathered}[stage]
    room = compute_sec * (1.0 if stage == 3 else 2 / 3)
    total = (reduced + gathered + features) / rate
    return Traffic(reduced + gathered, features, total, total - min(behind_backward / rate, room))


@dataclass(frozen=True)
class Pace:
    """One step and the whole run at one utilisation.

    Attributes:
        mfu: share of the peak, counted on the operations of the model without repetition.
        step_sec, days, gpu_hours: of one step; of the run, failures included.
        seconds: a step's need of each resource.
        binding: the resource that takes longest.
    """

    mfu: float
    step_sec: float
    samples_per_sec: float
    days: float
    gpu_hours: float
    seconds: dict[Resource, float]
    binding: Resource
    traffic: Traffic


@dataclass(frozen=True)
class Failures:
    """How often the run will break, and how often to save."""

    mean_hours_between: float
    expected: float
    checkpoint_bytes: int
    save_sec: float
    interval_sec: float
    interval_steps: int
    goodput: float


def pace(job: Job, gpu: Hardware, assumed: Assumptions, mfu: float) -> Pace:
    """Time at a given utilisation."""
    ops = operations(job)
    per_rank = job.global_batch_size / job.num_gpus
    compute = per_rank * ops.model / (gpu.peak_tflops(job.numerics) * 1e12 * mfu)
    exchange = traffic(job, gpu, compute)
    seconds: dict[Resource, float] = {
        "compute": compute,
        "network": exchange.seconds,
        "data": per_rank / (gpu.cores_per_gpu * assumed.samples_per_core_sec),
        "storage": job.global_batch_size * assumed.bytes_per_sample / (assumed.storage_gb_per_sec * 1e9),
    }
    step = max(compute + exchange.exposed_seconds, seconds["data"], seconds["storage"])
    binding = max(seconds, key=lambda name: seconds[name])
    run_sec = job.num_steps * step / failures(job, assumed, step).goodput
    return Pace(
        mfu=mfu,
        step_sec=step,
        samples_per_sec=job.global_batch_size / step,
        days=run_sec / 86400,
        gpu_hours=run_sec * job.num_gpus / 3600,
        seconds=seconds,
        binding=binding,
        traffic=exchange,
    )


def failures(job: Job, assumed: Assumptions, step_sec: float) -> Failures:
    """Expected interruptions, and Young's checkpoint interval sqrt(2 save MTBF)."""
    mtbf = assumed.gpu_hours_per_failure / job.num_gpus * 3600
    size = 12 * towers.count_parameters(job.model).total  # float32 weights and two moments
    save = size / (assumed.save_gb_per_sec * 1e9)
    interval = math.sqrt(2 * save * mtbf)
    lost = save / interval + interval / (2 * mtbf) + assumed.restart_minutes * 60 / mtbf
    run_sec = job.num_steps * step_sec
    steps = max(1, min(job.num_steps, round(interval / step_sec)))
    if run_sec < interval:  # one save at the end is enough
        lost = save / max(run_sec, 1e-9) if run_sec > 60 else 0.0
        interval = run_sec
    return Failures(mtbf / 3600, run_sec / mtbf, size, save, interval, steps, max(0.05, 1 - lost))


# ---------------------------------------------------------------------------------------------------------- advice


@dataclass(frozen=True)
class Choice:
    """A way to run the job that fits: what to change, its memory, and how fast it would be."""

    job: Job
    memory_bytes: int
    step_sec: float


def choices(job: Job, gpu: Hardware, assumed: Assumptions) -> list[Choice]:
    """Every engine, ZeRO stage, checkpointing and accumulation that fits, the fastest first."""
    engines: list[tuple[Literal["single", "ddp", "zero"], int]]
    engines = [("single", 0)] if job.num_gpus == 1 else [("ddp", 0), ("zero", 1), ("zero", 2), ("zero", 3)]
    found = []
    for kind, stage in engines:
        for checkpointing in (False, True):
            accumulation = 1
            while accumulation * job.num_gpus <= job.global_batch_size and accumulation <= 1024:
                candidate = replace(
                    job, engine=kind, zero_stage=stage, checkpointing=checkpointing, accumulation=accumulation
                )
                total = memory(candidate).total
                if total <= gpu.memory_gib * mem.GIB:
                    found.append(Choice(candidate, total, _step_with_repetition(candidate, gpu, assumed)))
                    break  # less accumulation is faster
                accumulation *= 2
    # of equals, the one with the most room
    return sorted(found, key=lambda choice: (round(choice.step_sec, 6), choice.memory_bytes))


def _step_with_repetition(job: Job, gpu: Hardware, assumed: Assumptions) -> float:
    likely = pace(job, gpu, assumed, gpu.mfu[1])
    ops = operations(job)
    extra = likely.seconds["compute"] * (ops.executed / ops.model - 1)
    return likely.step_sec + extra


def largest_micro_batch(job: Job, gpu: Hardware) -> int:
    """Samples of one rank that fit with the global batch as it is; 0 if not even one."""

    def fits(batch: int) -> bool:
        ranks = max(1, -(-job.global_batch_size // batch))
        per_rank = replace(job, accumulation=max(1, -(-ranks // job.num_gpus)))
        return memory(per_rank).total <= gpu.memory_gib * mem.GIB

    low, high = 0, job.micro_batch_size * job.accumulation
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def enough_gpus(job: Job, gpu: Hardware) -> int | None:
    """Fewest ranks, doubling, on which the job fits as it is; None if even one sample a rank does not."""
    ranks = job.num_gpus
    while ranks <= job.global_batch_size:
        if memory(replace(job, num_gpus=ranks, engine=_engine(job, ranks))).total <= gpu.memory_gib * mem.GIB:
            return ranks
        ranks *= 2
    return None


def _engine(job: Job, num_gpus: int) -> Literal["single", "ddp", "zero"]:
    return "ddp" if job.engine == "single" and num_gpus > 1 else job.engine
