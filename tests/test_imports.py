"""Who may import whom (docs/design.md), and what never imports torch."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "evatool"

# cli -> stages -> siblings -> recipe, distributed -> errors, log, types, ...; api and plan stand beside stages
LAYERS = (
    ("errors", "log", "types", "pixels"),
    ("progress", "tensorfile"),
    ("torchfile",),
    ("recipe", "distributed"),
    ("data", "model", "objective", "optim", "train", "checkpoint", "export", "eval"),
    ("stages", "api", "plan"),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# On the same level, but not siblings: a stage may use the api, and an engine is built from a typed recipe section.
ALSO_ALLOWED = {("stages", "api"), ("stages", "plan"), ("distributed", "recipe")}
TORCH_FREE = ("cli", "recipe", "plan", "errors", "log", "types", "progress")


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def owner(path: Path) -> str:
    """The layer a file belongs to: its folder, or its own name at the top."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_names(node: ast.AST) -> list[str]:
    """Absolute module names of an import statement; `from evatool import log` counts as evatool.log."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def run_time_imports(tree: ast.AST) -> list[str]:
    """Names imported anywhere in the file, inside functions too, except under `if TYPE_CHECKING`."""
    found: list[str] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        found += imported_names(node) + run_time_imports(node)
    return found


def layers_used(path: Path) -> set[str]:
    names = [name.split(".") for name in run_time_imports(ast.parse(path.read_text(encoding="utf-8")))]
    return {parts[1] for parts in names if parts[0] == "evatool" and len(parts) > 1 and parts[1] in LEVEL}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = owner(path)
    assert own in LEVEL, f"{own} is new: give it a layer in this test and in docs/design.md"
    wrong = {
        used for used in layers_used(path) - {own} if LEVEL[used] >= LEVEL[own] and (own, used) not in ALSO_ALLOWED
    }
    assert not wrong, f"{own} must not import {sorted(wrong)}"


def test_no_relative_imports() -> None:
    """They would slip past the test above."""
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import evatool.cli", {"cli"}),
        ("from evatool import stages", {"stages"}),
        ("def f():\n    from evatool.data.loader import x", {"data"}),
        ("if TYPE_CHECKING:\n    from evatool.data import x", set()),
        ("from evatool import __version__", set()),
    ],
)
def test_the_rule_sees_every_kind_of_import(source: str, expected: set[str], tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(source)
    assert layers_used(path) == expected


@pytest.mark.parametrize("name", TORCH_FREE)
def test_torch_is_not_imported_even_lazily(name: str) -> None:
    for path in modules():
        if owner(path) == name:
            roots = {imported.split(".")[0] for imported in run_time_imports(ast.parse(path.read_text("utf-8")))}
            assert not roots & {"torch", "timm", "open_clip", "torchvision", "deepspeed", "numpy"}, path


LOADED = """
import json, sys
{code}
heavy = "torch timm open_clip torchvision deepspeed webdataset clip_benchmark matplotlib numpy".split()
print("LOADED" + json.dumps([name for name in heavy if name in sys.modules]))
"""
WALK = """
import importlib, pkgutil, evatool.{package} as package
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
"""
COMMAND = """
from evatool.cli.app import app
sys.argv = ["evatool", *{arguments!r}]
try:
    app()
except SystemExit as error:
    assert error.code == {code}, error.code
"""
FREE = {
    "import evatool": "import evatool",
    "all of cli": WALK.format(package="cli"),
    "all of recipe": WALK.format(package="recipe"),
    "all of plan": WALK.format(package="plan"),
    "--help": COMMAND.format(arguments=["--help"], code=0),
    "--version": COMMAND.format(arguments=["--version"], code=0),
    "stage --help": COMMAND.format(arguments=["train-clip", "--help"], code=0),
    "--dry-run": COMMAND.format(arguments=["pretrain-mim", "demo/pretrain-mim", "--dry-run"], code=0),
    "recipe list": COMMAND.format(arguments=["recipe", "list"], code=0),
    "recipe check": COMMAND.format(arguments=["recipe", "check", "demo/distill"], code=0),
    "recipe typo": COMMAND.format(arguments=["train-clip", "demo/train-clip", "--set", "train.sed=1"], code=2),
    "missing recipe": COMMAND.format(arguments=["train-clip", "gone.toml"], code=2),
    "stage mismatch": COMMAND.format(arguments=["eval", "demo/train-clip"], code=2),
}


@pytest.mark.parametrize("code", FREE.values(), ids=FREE)
def test_what_must_be_instant_imports_nothing_heavy(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", LOADED.format(code=code)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.rpartition("LOADED")[2]) == []


def test_test_files_have_names_of_their_own() -> None:
    """pytest imports them by name: of two alike, one is silently taken for the other or refused."""
    names = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
