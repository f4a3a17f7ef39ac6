"""What the data benchmarks share: a baseline in an environment of its own, asked in turn with ours in one run.

open_clip's reader needs webdataset <= 0.2.86 and numpy < 2.4, evatool needs newer ones. So the baseline runs in a
process of a virtual environment that has those, and takes every other package (torch, open_clip, Pillow, ftfy) from the
environment that runs the benchmark: both sides decode with the same libraries.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

BASELINE_PACKAGES = ("webdataset==0.2.86", "numpy<2.4", "pandas<3")
VERSIONS = ("torch", "numpy", "pillow", "simplejpeg", "open_clip_torch", "webdataset", "ftfy")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def cache_folder() -> Path:
    """Folder for what is fetched once: the environment, captions."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evatool" / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def baseline_python(packages: Sequence[str] = BASELINE_PACKAGES) -> Path:
    """Interpreter of the baseline's environment, made when first asked for (uv where installed, else venv and pip)."""
    parent = sysconfig.get_paths()["purelib"]
    name = hashlib.sha256(repr((packages, parent, sys.version)).encode()).hexdigest()[:12]
    folder = cache_folder() / f"environment-{name}"
    python = folder / "bin" / "python"
    if not (folder / "complete").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
        if uv:
            subprocess.run([uv, "venv", "-q", "--python", sys.executable, str(folder)], check=True)
            subprocess.run([uv, "pip", "install", "-q", "--python", str(python), *packages], check=True)
        else:
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
        # After the environment's own packages, so that those win.
        own = next((folder / "lib").glob("python3*/site-packages"))
        (own / "parent.pth").write_text(f"{parent}\n")
        (folder / "complete").touch()
    return python


class Worker:
    """A process that answers calls of `serve` in the same script.

    Args:
        script: its file.
        python: interpreter; this one when absent.
    """

    def __init__(self, script: str, python: Path | None = None) -> None:
        command = [str(python or sys.executable), script, "--worker"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **ONE_THREAD}
        )

    def call(self, name: str, *args: Any) -> Any:
        """What the function returned. Raises: RuntimeError where the process ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([name, args]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended at {name}{args}; its message is above")
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve(functions: dict[str, Callable[..., Any]]) -> None:
    """Answer calls from standard input until it ends; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        name, args = json.loads(line)
        answers.write(json.dumps(functions[name](*args)) + "\n")
        answers.flush()


def cpu_sec(work: Callable[[], Any]) -> float:
    """CPU seconds of this process, all threads."""
    start = time.process_time()
    work()
    return time.process_time() - start


def versions() -> dict[str, str]:
    """Versions of this process's packages."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def machine() -> str:
    """Processor and Python."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def finish(report: dict[str, Any], failures: Sequence[str], json_path: Path | None) -> None:
    """Write the report, and exit with 1 where a gate failed."""
    if json_path is not None:
        json_path.write_text(json.dumps({**report, "failures": list(failures)}, indent=1) + "\n")
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    sys.exit(1 if failures else 0)
