"""How fast a run goes and how long it waits for data."""

from __future__ import annotations

import time

import torch


class Throughput:
    """Samples per second and share of time spent waiting for data, since the last reading.

    The clock on the CPU is enough: a reading follows the fetch of a loss, which waits for the GPU.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._samples = 0
        self._data_wait_sec = 0.0

    def add(self, num_samples: int, data_wait_sec: float) -> None:
        """Count one step over all ranks."""
        self._samples += num_samples
        self._data_wait_sec += data_wait_sec

    def read(self) -> dict[str, float]:
        """Figures since the last call, which starts the next interval."""
        now = time.perf_counter()
        elapsed = max(now - self._start, 1e-9)
        figures = {
            "throughput/samples_per_sec": self._samples / elapsed,
            "throughput/data_wait_fraction": self._data_wait_sec / elapsed,
        }
        self._start, self._samples, self._data_wait_sec = now, 0, 0.0
        return figures


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
