"""How fast a run goes and how long it waits for data."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """What training costs, and what the hardware could do."""

    flops_per_sample: float  # model FLOPs of forward and backward pass; what is computed a second time does not count
    peak_flops: float  # a second, of all ranks together


class Throughput:
    """Samples per second, share of time spent waiting for data and share of the peak used, since the last reading.

    The clock on the CPU is enough: a reading follows the fetch of a loss, which waits for the GPU.
    """

    def __init__(self, work: Work | None = None) -> None:
        self._work, self._has_said_why = work, False
        self._start = time.perf_counter()
        self._samples = 0
        self._data_wait_sec = 0.0

    def add(self, num_samples: int, data_wait_sec: float) -> None:
        """Count one step over all ranks."""
        self._samples += num_samples
        self._data_wait_sec += data_wait_sec

    def read(self, samples_left: int = 0) -> dict[str, float]:
        """Figures since the last call, which starts the next interval, and the seconds for `samples_left` more."""
        now = time.perf_counter()
        elapsed = max(now - self._start, 1e-9)
        speed = self._samples / elapsed
        rates = {
            "throughput/samples_per_sec": speed,
            "throughput/data_wait_fraction": self._data_wait_sec / elapsed,
            "throughput/eta_sec": samples_left / speed if speed else 0.0,
        }
        if self._work is not None:
            rates |= self._mfu(speed * self._work.flops_per_sample / self._work.peak_flops)
        self._start, self._samples, self._data_wait_sec = now, 0, 0.0
        return rates

    def _mfu(self, mfu: float) -> dict[str, float]:
        """The share of the peak as a figure, where it can be one.

        Model FLOPs count every caption at its full length; the padding that a text tower leaves out is not computed.
        Above 1 they say nothing of the hardware any more.
        """
        if mfu <= 1:
            return {"throughput/mfu": mfu}
        if not self._has_said_why:
            self._has_said_why = True
            log.info(
                "no share of the peak (MFU) is shown while it would be above 100 %%: model FLOPs count the padding of "
                "captions, which is not computed"
            )
        return {}


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory in use so far: allocated on a GPU, resident on a CPU; 0 where it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # KiB on Linux


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense peak of one device in floating-point operations a second; None for a GPU that is not in the list.

    Of a GPU the data sheet's; of a CPU the rate of a large matrix product, measured now, in a fifth of a second.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).lower()
        known = next((peaks for word, peaks in _PEAK_TFLOPS.items() if word in name), None)
        return None if known is None else 1e12 * known[0 if precision == "fp32" else 1]
    side = 768
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


_PEAK_TFLOPS = {
    "h200": (67.0, 989.0),
    "h100": (67.0, 989.0),
    "a100": (19.5, 312.0),
    "mi300x": (163.4, 1307.0),
}
"""Part of a GPU's name -> float32 (without TF32) and 16-bit peak of its data sheet, dense, in TFLOP/s."""
