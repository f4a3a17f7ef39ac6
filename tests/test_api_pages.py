"""`make docs`: the API reference has a page for every module, the public face first, and asks no other server."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import evatool

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def loaded_from_elsewhere(page: str) -> list[str]:
    """Addresses from which a browser would fetch something to show the page; links that a reader follows are none."""
    return re.findall(r'(?:src=|<link[^>]*href=|url\()["\']?(https?://[^"\')]+)', page)


def test_the_public_face_is_documented(script: ModuleType, tmp_path: Path) -> None:
    script.write(tmp_path, ["evatool"])
    page = (tmp_path / "evatool.html").read_text(encoding="utf-8")
    assert [name for name in evatool.__all__ if f'id="{name}"' not in page] == []
    assert loaded_from_elsewhere(page) == []


def test_every_module_has_a_page_but_the_commands(script: ModuleType) -> None:
    files = (ROOT / "evatool").rglob("*.py")
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files}
    private = {name for name in names if name.startswith("evatool.cli") or ".__" in name or "._" in name}
    assert set(script.modules()) == names - private
    assert script.modules()[0] == "evatool"


@pytest.mark.slow
def test_all_pages_are_written(script: ModuleType, tmp_path: Path) -> None:
    script.write(tmp_path, script.modules())
    pages = {".".join(page.relative_to(tmp_path).with_suffix("").parts) for page in tmp_path.rglob("*.html")}
    assert pages == {*script.modules(), "index"}
    assert [page for page in tmp_path.rglob("*.html") if loaded_from_elsewhere(page.read_text(encoding="utf-8"))] == []
