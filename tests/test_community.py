"""Files beside the package: they parse, say the package's version, and name commands that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import evatool

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parent.parent
YAML = [
    *sorted((ROOT / ".github").rglob("*.yml")),
    *(ROOT / name for name in (".pre-commit-config.yaml", "CITATION.cff")),
]
PAGES = [
    *sorted((ROOT / ".github").rglob("*.md")),
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CODE_OF_CONDUCT.md", "SECURITY.md", "CONTRIBUTING.md")),
]
REGISTRIES = re.compile(r"\b(?:pypi\.org|pythonhosted\.org|download\.pytorch\.org|conda\.anaconda\.org)\b")


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_it_parses_and_fetches_from_no_registry_by_name(path: Path) -> None:
    assert read(path)
    assert not REGISTRIES.search(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", [path for path in (*YAML, *PAGES) if path.exists()], ids=lambda path: path.name)
def test_make_commands_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"(?:^|[`\s])(?:- run: )?make ([a-z][\w-]*)(?=[`\s]|$)", text, re.MULTILINE)
    if path.suffix == ".md":  # prose says "make" too: there only code counts
        named = re.findall(r"`make ([a-z][\w-]*)", text) + re.findall(r"^make ([a-z][\w-]*)", text, re.MULTILINE)
    assert [name for name in named if name not in targets()] == []


def test_the_jobs_are_lint_tests_docs_and_wheel() -> None:
    jobs = read(ROOT / ".github/workflows/ci.yml")["jobs"]
    assert set(jobs) == {"lint", "test", "docs", "wheel"}
    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    commands = {job: [step["run"] for step in jobs[job]["steps"] if "run" in step] for job in jobs}
    assert commands["lint"] == ["make lint PYTHON=python"]
    assert commands["test"][-1] == "make test PYTHON=python"
    assert commands["docs"][0] == "make docs PYTHON=python"
    wheel = "\n".join(commands["wheel"])
    assert [word for word in ("python -m build", "evatool --version", "evatool recipe list") if word not in wheel] == []


def test_hooks_are_those_of_make_lint() -> None:
    (local,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert local["repo"] == "local"
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert lint is not None
    tools = re.findall(r"bin/(\w+)", lint.group(1))
    hooked = [re.findall(r"bin/(\w+)", hook["entry"])[0] for hook in local["hooks"]]
    assert hooked == tools


def test_issue_forms_have_what_a_form_needs() -> None:
    for name in ("bug_report.yml", "feature_request.yml"):
        form = read(ROOT / ".github/ISSUE_TEMPLATE" / name)
        assert {"name", "description", "body"} <= set(form)
        assert len({part["id"] for part in form["body"]}) == len(form["body"])
        assert any(part.get("validations", {}).get("required") for part in form["body"])


def test_the_citation_has_the_packages_version() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert str(citation["version"]) == evatool.__version__
    assert citation["authors"] == [{"name": "The evatool authors"}]
