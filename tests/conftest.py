"""What all tests share: GPU tests skip without one, and `make test-full` can be resumed and leaves its result."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Processes that tests start find the helpers as the tests do (`pythonpath` in pyproject.toml).
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "tests/helpers"), os.environ.get("PYTHONPATH")]))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("evatool")
    group.addoption("--resume-file", type=Path, help="keep the ids of passed tests here and skip them next time")
    group.addoption("--record", type=Path, help="write the result of a complete, passing run to this Markdown page")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What evaluations keep between runs stays out of the user's cache folder, of subprocesses too."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


def tree_fingerprint() -> str:
    """Hash of every tracked or new file's content: a result holds for exactly this tree."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", ":!docs/test-full.md"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    digest = hashlib.sha256()
    for name in sorted(filter(None, names)):
        path = ROOT / os.fsdecode(name)
        digest.update(name + b"\0" + (path.read_bytes() if path.is_file() else b"") + b"\0")
    return digest.hexdigest()


class Resume:
    """Runs on the controlling process only: collects outcomes, keeps the resume file, writes the record."""

    def __init__(self, path: Path | None, record: Path | None) -> None:
        self.path, self.record, self.started = path, record, time.time()
        self.fingerprint = tree_fingerprint()
        self.passed: list[str] = []
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.failed: list[str] = []
        if path and path.exists():
            stored = json.loads(path.read_text())
            if stored["fingerprint"] == self.fingerprint:
                self.passed = stored["passed"]
        self.repeated = len(self.passed)

    def pytest_configure_node(self, node: object) -> None:
        node.workerinput["already_passed"] = list(self.passed)  # type: ignore[attr-defined]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            self.failed.append(report.nodeid)
        if report.when == "call" and report.passed and self.path:
            self.passed.append(report.nodeid)
            state = {"fingerprint": self.fingerprint, "passed": self.passed}
            self.path.write_text(json.dumps(state))

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus in (0, 1) and self.record:  # it came to its end, whatever it found
            self.record.write_text(self.page())
        if exitstatus == 0 and self.path:
            self.path.unlink(missing_ok=True)

    def page(self) -> str:
        import torch

        rows = {
            "passed": self.counts["passed"] + self.repeated,
            "failed": ", ".join(f"`{name}`" for name in self.failed) or "0",
            "skipped": self.counts["skipped"],
            "tree": self.fingerprint[:16],
            "date": time.strftime("%Y-%m-%d"),
            "minutes": f"{(time.time() - self.started) / 60:.1f}"
            + (f" ({self.repeated} tests kept from an earlier, interrupted run)" if self.repeated else ""),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, GPU {torch.cuda.is_available()}",
            "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        }
        lines = [f"| {key} | {value} |" for key, value in rows.items()]
        return "\n".join(["# The last complete `make test-full`", "", "| | |", "| --- | --- |", *lines, ""])


def pytest_configure(config: pytest.Config) -> None:
    path, record = config.getoption("--resume-file"), config.getoption("--record")
    if (path or record) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Resume(path, record), "evatool-resume")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            for item in items:
                if item.get_closest_marker("gpu"):
                    item.add_marker(pytest.mark.skip(reason="needs a GPU"))
    plugin = config.pluginmanager.get_plugin("evatool-resume")
    passed = set(plugin.passed if plugin else getattr(config, "workerinput", {}).get("already_passed", []))
    if passed:
        kept = [item for item in items if item.nodeid not in passed]
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
        items[:] = kept
