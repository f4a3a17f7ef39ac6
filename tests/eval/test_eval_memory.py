"""No matrix of logits or similarities is kept: peak memory, measured in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "eval_memory.py"
MATRIX_MB = 320  # 4,000 x 20,000 float32


def test_matrices_of_scores_never_exist() -> None:
    """The full-size figures are in docs/benchmarks.md; the script also compares ranks with float64."""
    sizes = "--rows 20000 --classes 4000 --images 4000 --texts 20000 --width 8"
    command = [sys.executable, str(SCRIPT), *sizes.split(), "--limit", str(MATRIX_MB // 2)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert f"all logits in float32 would be {MATRIX_MB} MB" in done.stdout
    assert "retrieval 4,000 x 20,000" in done.stdout
