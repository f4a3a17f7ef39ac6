"""docs/extending.md is a program that runs: extensions from outside the package, without editing it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_of_extensions_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    sections = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert len(blocks) > len(sections)
    program = tmp_path / "extending.py"
    program.write_text("\n\n".join(blocks) + '\nprint("extended")\n')
    done = subprocess.run([sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.rstrip().endswith("extended")
