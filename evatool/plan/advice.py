"""Ways to run a job that fit, and which is fastest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from evatool.plan.estimate import memory, operations
from evatool.plan.hardware import Assumptions, Hardware
from evatool.plan.job import PlannedJob
from evatool.plan.memory import GIB, Checkpointing
from evatool.plan.pace import host_bytes, pace

MOST_PASSES = 1024
_KEPT: tuple[Checkpointing, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Choice:
    """A way to run the job that fits: what to change, its memory, and how fast it would be."""

    job: PlannedJob
    memory_bytes: int
    step_sec: float


def engines(job: PlannedJob) -> dict[str, PlannedJob]:
    """The same job on every engine that its ranks and its optimiser allow, by name."""

    def on(kind: str, stage: int = 0, offload: str = "none") -> PlannedJob:
        return replace(job, engine=kind, zero_stage=stage, offload=offload)  # type: ignore[arg-type]

    whole = {"single": on("single")} if job.num_gpus == 1 else {"ddp": on("ddp"), "fsdp2": on("fsdp2")}
    if job.num_gpus > 1:
        whole |= {f"ZeRO-{stage}": on("deepspeed", stage) for stage in range(4)}
    if job.optimizer != "adamw":
        return whole
    offloaded = {f"ZeRO-{stage}, offload": on("deepspeed", stage, "optimizer") for stage in (1, 2, 3)}
    return whole | offloaded | {"ZeRO-3, all offload": on("deepspeed", 3, "optimizer-and-weights")}


def fits(job: PlannedJob, gpu: Hardware) -> bool:
    """Whether accelerator and main memory are enough."""
    return memory(job).total <= gpu.memory_gib * GIB and host_bytes(job, gpu) <= gpu.host_gib * GIB


def choices(job: PlannedJob, gpu: Hardware, assumed: Assumptions) -> list[Choice]:
    """Every engine, checkpointing and number of micro-batches that fits, the fastest first."""
    found = []
    for each in engines(job).values():
        for checkpointing in _KEPT:
            if checkpointing == "selective" and each.engine == "deepspeed" and each.zero_stage == 3:
                continue  # refused by the recipe
            options = (replace(each, checkpointing=checkpointing, accumulation=n) for n in _accumulations(job))
            fitting = next((option for option in options if fits(option, gpu)), None)  # less accumulation is faster
            if fitting is not None:
                found.append(Choice(fitting, memory(fitting).total, step_sec(fitting, gpu, assumed)))
    # of equals, the one with the most room
    return sorted(found, key=lambda choice: (round(choice.step_sec, 6), choice.memory_bytes))


def _accumulations(job: PlannedJob) -> Iterator[int]:
    """Numbers of micro-batches into which a rank's samples divide evenly, rising."""
    samples = -(-job.global_batch_size // job.num_gpus)
    return (n for n in range(1, min(samples, MOST_PASSES) + 1) if samples % n == 0)


def step_sec(job: PlannedJob, gpu: Hardware, assumed: Assumptions) -> float:
    """Seconds a step at the likely utilisation, with what checkpointing and micro-batches compute again."""
    likely = pace(job, gpu, assumed, gpu.mfu[1])
    ops = operations(job)
    repeated = ops.executed / ops.model - 1
    if job.checkpointing == "selective":
        repeated += assumed.selective_share
    return likely.step_sec + likely.seconds["compute"] * repeated


def largest_micro_batch(job: PlannedJob, gpu: Hardware) -> int:
    """Samples of one rank that fit with the global batch as it is; 0 if not even one."""

    def fits_with(batch: int) -> bool:
        ranks = max(1, -(-job.global_batch_size // batch))
        return fits(replace(job, accumulation=max(1, -(-ranks // job.num_gpus))), gpu)

    low, high = 0, job.micro_batch_size * job.accumulation
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits_with(middle) else (low, middle - 1)
    return low


def enough_gpus(job: PlannedJob, gpu: Hardware) -> int | None:
    """Fewest ranks on which the job fits with its settings, over which the global batch divides: any number within a
    machine, whole machines beyond one; parts of machines where the batch divides over no whole ones. None if even one
    sample a rank does not fit."""
    counts = [n for n in range(job.num_gpus, job.global_batch_size + 1) if job.global_batch_size % n == 0]
    whole = [n for n in counts if n <= gpu.gpus_per_node or n % gpu.gpus_per_node == 0]
    return next((n for n in (*whole, *counts) if fits(on_ranks(job, n), gpu)), None)


def on_ranks(job: PlannedJob, num_gpus: int) -> PlannedJob:
    """The same recipe on another number of ranks: a micro-batch that it states stays, with more or fewer passes."""
    kind = "fsdp2" if job.engine == "single" and num_gpus > 1 else job.engine
    passes = 1
    if job.accumulation > 1:
        passes = -(-job.global_batch_size // (num_gpus * job.micro_batch_size))
    return replace(job, num_gpus=num_gpus, engine=kind, accumulation=passes)
