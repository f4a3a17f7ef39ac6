"""One file knows DeepSpeed's internals, and one version of them."""

from __future__ import annotations

import ast
import re
from importlib import metadata
from pathlib import Path

import pytest

from evatool.distributed.engines.deepspeed import SUPPORTED_VERSION

PACKAGE = Path(__file__).resolve().parents[2] / "evatool"
ENGINE = PACKAGE / "distributed" / "engines" / "deepspeed.py"
INTERNALS = re.compile(r"\b(_hp_mapping|ds_tensor|ds_numel|ds_id|fp32_partitioned_groups_flat|_global_grad_norm)\b")


def test_the_installed_version_is_the_one_whose_internals_are_known() -> None:
    try:
        installed = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        pytest.skip("DeepSpeed is not installed")
    assert installed.split(".")[:2] == SUPPORTED_VERSION.split("."), (
        f"DeepSpeed {installed} is installed, and {ENGINE.name} was written for {SUPPORTED_VERSION}: read through what "
        "it uses of DeepSpeed's internals, run tests/dist/test_engines.py and tests/dist/test_to_deepspeed.py, then "
        "raise SUPPORTED_VERSION"
    )


def test_no_other_file_touches_deepspeed() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path == ENGINE:
            continue
        text = path.read_text(encoding="utf-8")
        assert not INTERNALS.search(text), path
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "deepspeed" for name in names), f"{path}:{node.lineno}"


def test_the_engine_does_use_them() -> None:
    """So that the patterns above can find something."""
    assert INTERNALS.search(ENGINE.read_text(encoding="utf-8"))
