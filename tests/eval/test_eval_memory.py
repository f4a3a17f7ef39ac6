"""No matrix of logits or similarities is kept: peak memory, measured in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "eval_memory.py"
MATRIX_MB = 320  # 4,000 x 20,000 float32


@pytest.mark.parametrize(
    "sizes",
    ["--rows 20000 --classes 4000 --images 0", "--rows 0 --images 4000 --texts 20000"],
    ids=["classification", "retrieval"],
)
def test_the_matrix_of_scores_never_exists(sizes: str) -> None:
    """The full-size figures are in docs/benchmarks.md; the script also compares ranks with float64."""
    command = [sys.executable, str(SCRIPT), *sizes.split(), "--width", "8", "--limit", str(MATRIX_MB // 2)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert f"would be {MATRIX_MB} MB" in done.stdout or "would be 0 GB" in done.stdout
