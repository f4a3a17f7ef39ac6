"""Who may import whom (docs/design.md), that nothing imports in a circle, and what never imports torch."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "evatool"

# The rooms in their order, and for each the rooms that it imports: arrows point up this table only. A new arrow is a
# decision: add it here and to docs/design.md. What an arrow permits, inner imports and TYPE_CHECKING use up too.
ARROWS: dict[str, str] = {
    "core": "",
    "formats": "core",
    "recipe": "core",
    "distributed": "core recipe",
    "checkpoint": "core formats distributed",
    "data": "core recipe",
    "model": "core distributed",
    "weights": "core formats checkpoint model",
    "teachers": "core formats distributed model weights",
    "objective": "core recipe distributed model teachers",
    "optim": "core recipe distributed",
    "train": "core distributed objective",
    "eval": "core distributed",
    "inference": "core formats data model weights",
    "export": "core formats model weights inference",
    "plan": "core recipe model",
    "runs": "core recipe",
    "stages": "core formats recipe distributed checkpoint data model weights teachers objective optim train eval "
    "export inference plan runs",
    "cli": "core recipe distributed model optim eval plan runs stages",
    "__main__": "core cli",
}
TORCH_FREE = ("cli", "recipe", "plan")
TORCH_FREE_FILES = (
    *("core/errors", "core/logging", "core/progress", "core/atomic_io", "core/renamed_keys"),
    *("core/batch", "core/batch_shares", "core/step", "core/loader", "core/param_group"),
    *("core/regular_files", "core/bounded_json", "core/bounded_toml"),
)
HEAVY = {"torch", "timm", "open_clip", "torchvision", "deepspeed", "numpy"}


def modules() -> dict[str, Path]:
    """Every file of the package by its dotted name; a folder's `__init__` has the folder's."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    """The folder below `evatool`, or the file's own name there; "" for `evatool/__init__.py`."""
    return module.split(".")[1] if "." in module else ""


def imported(tree: ast.AST) -> set[str]:
    """Absolute names of all imports of a file: at its top, inside functions and under `if TYPE_CHECKING`."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def run_time_imports(tree: ast.AST) -> set[str]:
    """As `imported`, without what stands under `if TYPE_CHECKING`."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= imported(node)
        found |= run_time_imports(node)
    return found


def used_modules(path: Path) -> set[str]:
    """The package's modules that a file imports."""
    names = imported(ast.parse(path.read_text(encoding="utf-8")))
    inside = {name for name in names if name.split(".")[0] == "evatool"}
    return {name if name in MODULES else name.rpartition(".")[0] for name in inside} - {""}


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of two or more modules each of which reaches each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph.get(node, ())):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = set(stack[stack.index(node) :])
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(group)

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def test_rooms_stand_in_order() -> None:
    rooms = list(ARROWS)
    for position, (name, targets) in enumerate(ARROWS.items()):
        assert set(targets.split()) <= set(rooms[:position]), f"{name} may import rooms above it in the table only"


def test_every_room_is_in_the_table_and_no_arrow_is_unused() -> None:
    assert {room(name) for name in MODULES} - {""} == set(ARROWS)
    used: dict[str, set[str]] = {name: set() for name in ARROWS}
    for name, path in MODULES.items():
        if room(name):
            used[room(name)] |= {room(target) for target in used_modules(path)} - {"", room(name)}
    assert {name: sorted(targets) for name, targets in used.items()} == {
        name: sorted(targets.split()) for name, targets in ARROWS.items()
    }


@pytest.mark.parametrize("module", [name for name in MODULES if room(name)])
def test_imports_follow_the_arrows(module: str) -> None:
    own = room(module)
    wrong = {target for target in used_modules(MODULES[module]) if room(target) not in {own, "", *ARROWS[own].split()}}
    assert not wrong, f"{own} must not import {sorted(wrong)}"


def test_nothing_imports_in_a_circle() -> None:
    """Inner imports and those under TYPE_CHECKING count: a circle is one wherever it is hidden."""
    graph = {name: used_modules(path) - {name} for name, path in MODULES.items() if name != "evatool"}
    assert [sorted(group) for group in circles(graph)] == []


def test_the_rule_sees_a_circle() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]
    assert circles({"a": {"b"}, "b": set()}) == []


def test_no_relative_imports() -> None:
    """They would slip past the tests above."""
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import evatool.cli.app", {"evatool.cli.app"}),
        ("from evatool import stages", {"evatool.stages"}),
        ("def f():\n    from evatool.data.train.loader import x", {"evatool.data.train.loader"}),
        ("if TYPE_CHECKING:\n    from evatool.data.train.loader import x", {"evatool.data.train.loader"}),
        ("from evatool import __version__", {"evatool"}),
    ],
)
def test_the_rule_sees_every_kind_of_import(source: str, expected: set[str], tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(source)
    assert used_modules(path) == expected


def is_torch_free(module: str, path: Path) -> bool:
    return room(module) in TORCH_FREE or str(path.relative_to(PACKAGE).with_suffix("")) in TORCH_FREE_FILES


@pytest.mark.parametrize("module", [name for name, path in MODULES.items() if is_torch_free(name, path)])
def test_torch_is_not_imported_even_lazily(module: str) -> None:
    roots = {name.split(".")[0] for name in run_time_imports(ast.parse(MODULES[module].read_text("utf-8")))}
    assert not roots & HEAVY, module


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
    "all of runs": WALK.format(package="runs"),
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
