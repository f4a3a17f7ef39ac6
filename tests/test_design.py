"""docs/design.md is the map: its tables are those of the code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def load_map() -> object:
    spec = importlib.util.spec_from_file_location("design_map", ROOT / "docs" / "map.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_map_is_the_code() -> None:
    design = load_map()
    assert design.PAGE.read_text(encoding="utf-8") == design.design_page(), "run: make reference"  # type: ignore[attr-defined]


def test_every_file_says_what_it_is() -> None:
    """A sentence of its own, since the map is made of them; a folder's `__init__` may be empty."""
    design = load_map()
    silent = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "evatool").rglob("*.py"))
        if path.name != "__init__.py" and not design.first_sentence(path)  # type: ignore[attr-defined]
    ]
    assert silent == []
