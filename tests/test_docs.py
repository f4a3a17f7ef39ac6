"""The pages tell the truth about what exists: links lead somewhere, commands name real recipes and run in CI."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from run_quickstart import script

from evatool.recipe.load import is_recipe, list_recipes

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(page: Path) -> list[list[str]]:
    """Every `evatool ...` command in the page's code blocks, without comments."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("evatool ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_that_are_named_ship(page: Path) -> None:
    named = {word for command in commands(page) for word in command if re.fullmatch(r"(demo|debug)/[\w-]+", word)}
    assert [name for name in sorted(named) if not is_recipe(name)] == []


def test_the_readme_shows_the_chain_that_the_quickstart_runs() -> None:
    ran = script().replace(" debug/", " demo/").splitlines()
    shown = [" ".join(command) for command in commands(ROOT / "README.md")]
    assert len(shown) >= 7
    assert [command for command in shown if command not in ran] == []


def test_every_demo_recipe_has_its_debug_form() -> None:
    names = {name for name, _, _ in list_recipes()}
    demo = {name.removeprefix("demo/") for name in names if name.startswith("demo/")}
    assert demo
    debug = {name.removeprefix("debug/") for name in names if name.startswith("debug/")}
    assert demo == {name for name in debug if "/" not in name}


def test_every_published_training_recipe_has_its_debug_form() -> None:
    recipes = {name: stage for name, stage, _ in list_recipes()}
    published = {
        name
        for name, stage in recipes.items()
        if not name.startswith(("demo/", "debug/", "evidence/")) and stage in ("pretrain-mim", "train-clip", "distill")
    }
    # The overlay of printed commands is the same everywhere: L/14 stands for it.
    own = {name for name in published if not name.endswith("-faithful") or name.startswith("eva02-clip-l-14/")}
    assert own
    assert {f"debug/{name}" for name in own} <= set(recipes)


def test_the_readme_names_every_published_model() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    folders = {name.rpartition("/")[0] for name, stage, _ in list_recipes() if stage == "train-clip"}
    ours = ("demo", "debug", "evidence")
    assert [f for f in sorted(folders) if not f.startswith(ours) and f"`{f}/`" not in text] == []


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in seen:
            continue
        seen.add(page)
        links = re.findall(r"\]\((?!https?:|#)([^)#]+\.md)", page.read_text(encoding="utf-8"))
        todo += [(page.parent / link).resolve() for link in links]
    assert [page.name for page in PAGES if page not in seen] == []


def test_the_tests_of_faults_exist() -> None:
    """Each row of docs/faults.md names tests that are there, by file and function; only R30 has none."""
    page = (ROOT / "docs/faults.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page)
    assert len(named) > 60
    texts = {file: (ROOT / file).read_text(encoding="utf-8") for file, _ in named}
    assert [f"{file}::{test}" for file, test in named if test and f"def {test}(" not in texts[file]] == []
    rows = re.findall(r'^\| <a id="r(\d+)"></a>R(\d+) \|.*\| ([^|]+) \|$', page, re.MULTILINE)
    assert [int(number) for _, number, _ in rows] == list(range(1, 33))
    assert all(number == anchor and ("`tests/" in tests or number == "30") for anchor, number, tests in rows)
