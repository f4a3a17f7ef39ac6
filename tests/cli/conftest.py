from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_stage import FakeStage, Invoke
from typer.testing import CliRunner

import evatool.stages
from evatool.cli.app import app


@pytest.fixture(autouse=True)
def _package_logger() -> Iterator[None]:
    """The command line configures the package's logger; later tests get it as it was."""
    logger = logging.getLogger("evatool")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before[0], before[1], before[2]


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Runs `evatool ...` in an empty current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)), prog_name="evatool")


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> FakeStage:
    """Every stage is replaced by one `FakeStage`."""
    fake = FakeStage()
    monkeypatch.setattr(evatool.stages, "import_module", lambda name: fake)
    return fake
