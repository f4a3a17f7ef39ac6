"""The public face: docs/api.md, `evatool.__all__` and what type checkers see are one list, and every name imports."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import evatool

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTED = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
# Names that people outside may rely on since the first release: they stay importable from `evatool`.
PROMISED = [
    "load_clip",
    "register",
    "EvatoolError",
    "resolve_preset",
    "ModelConfig",
    "PRESETS",
    "build_clip",
    "build_mim",
    "build_param_groups",
    "build_optimizer",
    "build_schedule",
    "build_engine",
    "build_tokenizer",
    "eva_arguments",
    "canonical_state",
    "open_weights",
    "load_clip_weights",
    "load_mim_weights",
    "Batch",
    "ClipObjective",
    "MimObjective",
    "EvalTransform",
    "open_eval_set",
    "MaskSpec",
]


def seen_by_type_checkers() -> dict[str, str]:
    """Name -> module, of the imports under `if TYPE_CHECKING`."""
    tree = ast.parse((ROOT / "evatool" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    return {
        alias.name: str(node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def test_the_page_lists_what_the_package_exports() -> None:
    assert sorted(DOCUMENTED) == sorted(evatool.__all__)
    assert set(PROMISED) <= set(evatool.__all__)


def test_the_lazy_table_is_what_type_checkers_see() -> None:
    homes = {name: f"evatool.{module}" for module, names in evatool._HOMES.items() for name in names.split()}
    assert homes == seen_by_type_checkers()
    assert {*homes, "__version__"} == set(evatool.__all__)


@pytest.mark.parametrize("name", evatool.__all__)
def test_every_name_is_the_one_of_its_home(name: str) -> None:
    found = getattr(evatool, name)
    if name != "__version__":
        assert found is getattr(importlib.import_module(seen_by_type_checkers()[name]), name)
    assert name in dir(evatool)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_clap'"):
        evatool.load_clap  # noqa: B018


def test_errors_and_presets_come_without_torch() -> None:
    code = "import sys; from evatool import EvatoolError, PRESETS, StepContext; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_version_stands_once() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in project
    assert re.search(r"^version = ", project, re.MULTILINE) is None
