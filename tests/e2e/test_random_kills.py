"""kill -9 of whole commands at random moments (rows R3 and R24 of docs/faults.md); 200 of them by
tests/benchmarks/random_kills.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import random_kills

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


@pytest.mark.parametrize(
    ("cell", "kills"), [("data-prepare-1", 3), ("train-clip-1", 2), ("train-clip-2", 2), ("export-1", 1), ("eval-2", 1)]
)
def test_kills_at_random_moments_change_nothing(tmp_path: Path, cell: str, kills: int) -> None:
    program = [sys.executable, random_kills.__file__, "--out", str(tmp_path), "--cells", cell]
    done = subprocess.run([*program, "--kills", str(kills)], capture_output=True, text=True, timeout=1500)
    assert f"{kills} kills: 0 stuck, 0 different, 0 failed" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0
