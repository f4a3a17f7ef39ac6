"""Peak memory of reading and writing weight files: the well-kept library's way beside ours, one tensor at a time.

    python tests/benchmarks/file_readers.py [MEGABYTES]

Files of 32 equal float32 tensors, 1,024 MB by default. Each step runs in a process of its own; what is shown is its
peak (`ru_maxrss`) less that of a process that imports the same and does nothing. A reader looks at every tensor's sum
and keeps none; a writer gets tensors that are made when they are asked for.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from evatool.formats.safetensors import SafetensorsMap, TensorMap, write_safetensors
from evatool.formats.torch_pickle import open_torch_archive
from evatool.formats.torch_zip import write_torch_archive

COUNT = 32


class Made(TensorMap):
    """Tensors made when they are asked for."""

    def __init__(self, megabytes: int) -> None:
        self._numel = megabytes * 1_000_000 // 4 // COUNT

    def __getitem__(self, name: str) -> Tensor:
        return torch.full((self._numel,), float(name.removeprefix("t")))

    def __iter__(self) -> Iterator[str]:
        return (f"t{number}" for number in range(COUNT))

    def __len__(self) -> int:
        return COUNT

    def shape(self, name: str) -> tuple[int, ...]:
        return (self._numel,)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32


def add_up(tensors: dict[str, Tensor] | TensorMap) -> None:
    for name in tensors:
        tensors[name].sum()


Step = Callable[[Path, int], None]
STEPS: dict[str, Step] = {
    "idle": lambda path, size: None,
    "safetensors.torch.save_file": lambda path, size: safetensors.torch.save_file(dict(Made(size)), path),
    "evatool write_safetensors": lambda path, size: write_safetensors(path, Made(size)),
    "safetensors.torch.load_file": lambda path, size: add_up(safetensors.torch.load_file(path)),
    "evatool SafetensorsMap": lambda path, size: add_up(SafetensorsMap(path)),
    "torch.save": lambda path, size: torch.save(dict(Made(size)), path),
    "evatool write_torch_archive": lambda path, size: write_torch_archive(path, Made(size)),
    "torch.load": lambda path, size: add_up(torch.load(path, weights_only=True)),
    "torch.load, mmap": lambda path, size: add_up(torch.load(path, weights_only=True, mmap=True)),
    "evatool open_torch_archive": lambda path, size: add_up(open_torch_archive(path)),
}


def measured(step: str, path: Path, megabytes: int) -> float:
    """Peak in MB of a step in a process of its own."""
    command = [sys.executable, __file__, "--step", step, str(path), str(megabytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout) * 1024 / 1e6


def main(megabytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = {"s": Path(folder, "weights.safetensors"), "t": Path(folder, "weights.pt")}
        write_safetensors(files["s"], Made(megabytes))
        write_torch_archive(files["t"], Made(megabytes))
        idle = measured("idle", files["s"], megabytes)
        print(f"{megabytes} MB in {COUNT} tensors; imports take {idle:.0f} MB")
        for step in list(STEPS)[1:]:
            is_writer = "save" in step or "write" in step
            source = files["t" if step.startswith("torch.") or "archive" in step else "s"]
            peak = measured(step, Path(folder, "new") if is_writer else source, megabytes)
            print(f"{step:30} {peak - idle:7.0f} MB")
            Path(folder, "new").unlink(missing_ok=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        STEPS[sys.argv[2]](Path(sys.argv[3]), int(sys.argv[4]))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    else:
        main(int(sys.argv[1]) if sys.argv[1:] else 1024)
