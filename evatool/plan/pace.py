"""A job on a kind of hardware: network, data, disk, time, failures.

Source: docs/reference/memory-and-scale.md#network, #time, #failures and #data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from evatool.plan import memory as mem
from evatool.plan import towers
from evatool.plan.estimate import learned_params, memory, operations
from evatool.plan.hardware import Assumptions, Hardware
from evatool.plan.job import PlannedJob

Resource = Literal["memory", "compute", "network", "data", "storage", "failures"]


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


def traffic(job: PlannedJob, gpu: Hardware, compute_sec: float) -> Traffic:
    """Exchanges of one step; ring algorithms, bytes sent and received (docs/reference/memory-and-scale.md#network)."""
    if job.num_gpus == 1:
        return Traffic(0, 0, 0.0, 0.0)
    weight = mem.NUMERICS[job.numerics].weight
    learned, params = learned_params(job) * weight, towers.count_parameters(job.model).total * weight
    setup, passes = job.setup, job.accumulation
    reduced = 2 * learned if setup.shards_nothing else learned  # given to everyone, or scattered only
    if setup.kind == "deepspeed" and setup.zero_stage > 1:
        reduced *= passes  # after each backward pass, not once a step
    weight_bytes = 0 if setup.shards_nothing else params if setup.shards_weights else learned
    if setup.shards_weights:
        # forward and backward; micro-batches of a contrastive loss go forward once more, for their features
        weight_bytes *= passes * (3 if passes > 1 and job.stage != "pretrain-mim" else 2)
    features = 0
    if job.stage != "pretrain-mim":
        everyone = job.global_batch_size * (job.model.embed_dim or 0)
        # Gathered, both towers and their gradients; or round a ring: captions, then captions with their gradients.
        features = 4 * everyone * 2 if job.numerics == "bf16" else 3 * everyone * mem.FP32
    rate = 1e9 * (gpu.node_gb_per_sec if job.num_gpus <= gpu.gpus_per_node else gpu.fabric_gb_per_sec)
    # Stage 1 reduces after the backward pass; stages 1 and 2 gather the new weights after the step.
    behind_compute = reduced + weight_bytes if setup.shards_weights else reduced
    if setup.kind == "deepspeed" and setup.zero_stage < 2:
        behind_compute = reduced if setup.zero_stage == 0 else 0
    room = compute_sec * (1.0 if setup.shards_weights else 2 / 3)
    total = (reduced + weight_bytes + features) / rate
    return Traffic(reduced + weight_bytes, features, total, total - min(behind_compute / rate, room))


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


def pace(job: PlannedJob, gpu: Hardware, assumed: Assumptions, mfu: float) -> Pace:
    """Time at a given utilisation."""
    ops = operations(job)
    per_rank = job.global_batch_size / job.num_gpus
    compute = per_rank * ops.model / (gpu.peak_tflops(job.numerics) * 1e12 * mfu)
    exchange = traffic(job, gpu, compute)
    compute += offload_sec(job, assumed)
    seconds: dict[Resource, float] = {
        "compute": compute,
        "network": exchange.seconds,
        "data": per_rank / (gpu.cores_per_gpu * assumed.samples_per_core_sec),
        "storage": job.global_batch_size * assumed.bytes_per_sample / (assumed.storage_gb_per_sec * 1e9),
    }
    step = max(compute + exchange.exposed_seconds, seconds["data"], seconds["storage"])
    goodput = failures(job, assumed, step).goodput
    seconds["failures"] = step * (1 / goodput - 1)  # saves, lost work and restarts, spread over the steps
    binding = max(seconds, key=lambda name: seconds[name])
    run_sec = job.num_steps * step / goodput
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


def checkpoint_bytes(job: PlannedJob) -> int:
    """Of one checkpoint: float32 weights, two moments of what learns, and the moving average of the weights."""
    params = towers.count_parameters(job.model).total
    return mem.FP32 * ((2 if job.averages else 1) * params + 2 * learned_params(job))


def failures(job: PlannedJob, assumed: Assumptions, step_sec: float) -> Failures:
    """Expected interruptions, and Young's checkpoint interval sqrt(2 save MTBF)."""
    mtbf = assumed.gpu_hours_per_failure / job.num_gpus * 3600
    size = checkpoint_bytes(job)
    writers = 1 if job.setup.shards_nothing else job.num_gpus  # each rank writes what no other holds
    save = size / (min(writers * assumed.save_gb_per_sec, assumed.storage_gb_per_sec) * 1e9)
    interval = math.sqrt(2 * save * mtbf)
    lost = save / interval + interval / (2 * mtbf) + assumed.restart_minutes * 60 / mtbf
    run_sec = job.num_steps * step_sec
    steps = max(1, min(job.num_steps, round(interval / step_sec)))
    if run_sec < interval:  # one save at the end is enough
        lost = save / max(run_sec, 1e-9) if run_sec > 60 else 0.0
        interval = run_sec
    return Failures(mtbf / 3600, run_sec / mtbf, size, save, interval, steps, max(0.05, 1 - lost))


def offload_sec(job: PlannedJob, assumed: Assumptions) -> float:
    """Seconds a step for what is kept in main memory: gradients down, the step on the CPU, weights up; nothing hides
    them. Offloaded weights come up for every pass as well."""
    if job.offload == "none":
        return 0.0
    piece = learned_params(job) / job.num_gpus
    copies = 2 if job.offload == "optimizer" else 2 + 2 * job.accumulation
    copied = copies * mem.FP32 * piece / (assumed.host_gb_per_sec * 1e9)
    return copied + piece / assumed.cpu_steps_per_sec


def host_bytes(job: PlannedJob, gpu: Hardware) -> int:
    """Main memory of one machine that offloaded states take."""
    return memory(job).host * min(job.num_gpus, gpu.gpus_per_node)
