"""Accelerators a run can be planned for, and what is assumed of the machines around them."""

from __future__ import annotations

import os
from dataclasses import dataclass

from evatool.core.errors import UsageError

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """One rank's share of a machine.

    Attributes:
        name: as on the command line.
        memory_gib: what a process can allocate, a little less than the name says.
        bf16_tflops, fp32_tflops: dense peak of the data sheet; float32 without TF32, which torch does not use unasked.
        node_gb_per_sec: bytes a rank can send within its machine, one way (NVLink, Infinity Fabric).
        fabric_gb_per_sec: the same between machines; an assumption, print it.
        gpus_per_node: ranks a machine.
        cores_per_gpu: CPU cores a rank has for its loader; an assumption.
        mfu: (low, likely, high) share of the peak that training reaches.
        source: where the figures come from.
        host_gib: main memory of a machine, for offload; an assumption.
    """

    name: str
    memory_gib: float
    bf16_tflops: float
    fp32_tflops: float
    node_gb_per_sec: float
    fabric_gb_per_sec: float
    gpus_per_node: int
    cores_per_gpu: int
    mfu: tuple[float, float, float]
    source: str
    host_gib: float = 1024.0

    def peak_tflops(self, numerics: str) -> float:
        """Dense peak for "fp32", or for 16-bit arithmetic."""
        return self.fp32_tflops if numerics == "fp32" else self.bf16_tflops


# docs/reference/memory-and-scale.md#time: 29 public CLIP runs on A100 lie between 3 and 30 %; 39 % is the best
# published figure.
_MFU = (0.20, 0.35, 0.45)
_A100 = "NVIDIA A100 data sheet; 200 Gb/s a GPU between machines is an assumption"

GPUS = (
    Hardware("h100", 79.1, 989.0, 67.0, 450.0, 50.0, 8, 16, _MFU, "NVIDIA H100 SXM data sheet; 400 Gb/s a GPU assumed"),
    Hardware("h200", 139.8, 989.0, 67.0, 450.0, 50.0, 8, 16, _MFU, "NVIDIA H200 data sheet; 400 Gb/s a GPU assumed"),
    Hardware("a100-40", 39.4, 312.0, 19.5, 300.0, 25.0, 8, 16, _MFU, _A100),
    Hardware("a100-80", 79.1, 312.0, 19.5, 300.0, 25.0, 8, 16, _MFU, _A100),
    Hardware("mi300x", 191.0, 1307.0, 163.4, 448.0, 50.0, 8, 16, _MFU, "AMD MI300X data sheet; 400 Gb/s a GPU assumed"),
)
HARDWARE_NAMES = (*(gpu.name for gpu in GPUS), "cpu")


def hardware(name: str) -> Hardware:
    """The accelerator called `name`. Raises: UsageError, naming those there are."""
    if name == "cpu":
        return _this_cpu()
    found = next((gpu for gpu in GPUS if gpu.name == name), None)
    if found is None:
        raise UsageError(f"no accelerator is called {name!r}", expected="one of " + ", ".join(HARDWARE_NAMES))
    return found


def _this_cpu() -> Hardware:
    """All of this machine as one rank; 80 GFLOP/s a core (AVX2 at 2.5 GHz) is a guess and is printed as one."""
    cores = os.cpu_count() or 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    peak = 0.08 * cores
    source = f"this machine: {cores} cores at an assumed 80 GFLOP/s each"
    return Hardware("cpu", memory, peak, peak, 10.0, 1.0, 1, cores, (0.1, 0.25, 0.5), source, memory)


@dataclass(frozen=True)
class Assumptions:
    """What no recipe says. Every figure is printed with the plan."""

    bytes_per_sample: float = 37_500.0
    """Picture and caption in the shards: LAION at 384 px (docs/reference/memory-and-scale.md#data); 8,500 at 256 px."""
    samples_per_core_sec: float = 500.0
    """Samples one core reads, decodes, crops and tokenises; Pillow decodes 537 to 726 pictures
    (docs/reference/memory-and-scale.md#data).
    """
    storage_gb_per_sec: float = 10.0
    """What the shared storage gives the whole job, reading or writing."""
    gpu_hours_per_failure: float = 50_700.0
    """419 interruptions in 54 days on 16,384 H100 (arXiv 2407.21783)."""
    restart_minutes: float = 10.0
    """From a failure to the next step."""
    save_gb_per_sec: float = 1.5
    """A rank writes and hashes this much; a save stops the run. Where weights are divided, all ranks write at once."""
    host_gb_per_sec: float = 25.0
    """One accelerator to and from main memory (PCIe 4.0 x16)."""
    cpu_steps_per_sec: float = 3e8
    """Parameters a second for which a rank's share of the CPU takes the optimiser's step: 40 bytes each at 12 GB/s."""
    selective_share: float = 0.05
    """Share of a step's computation that selective checkpointing repeats in norms, activations and rotations."""
