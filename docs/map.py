"""The map of the house in docs/design.md, made from the code: `python docs/map.py` (`make reference` calls it).

A file's line is the first sentence of its docstring; a room's arrows are those that tests/test_imports.py allows.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "evatool"
PAGE = ROOT / "docs" / "design.md"


def arrows() -> dict[str, str]:
    """Rooms in their order, each with the rooms that it imports, as tests/test_imports.py holds them."""
    tree = ast.parse((ROOT / "tests" / "test_imports.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "ARROWS":
            assert node.value is not None
            table: dict[str, str] = ast.literal_eval(node.value)
            return table
    raise ValueError("tests/test_imports.py has no table ARROWS")


def first_sentence(path: Path) -> str:
    """The first paragraph of a file's docstring, on one line."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split())


def arrow_table() -> str:
    """Markdown: each room and what it imports."""
    rows = [
        f"| `{room}` | {', '.join(f'`{target}`' for target in used.split()) or 'nothing'} |"
        for room, used in arrows().items()
    ]
    return "\n".join(["| room | imports |", "| --- | --- |", *rows])


def file_map() -> str:
    """Markdown: every file of the package with the first sentence of its docstring, room by room."""
    lines: list[str] = []
    for room in arrows():
        folder = PACKAGE / room
        paths = sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{room}.py"]
        lines += ["", f"**{room}**" if folder.is_dir() else f"**{room}.py**", ""]
        for path in paths:
            sentence = first_sentence(path)
            if path.name == "__init__.py" and not sentence:
                continue
            shown = path.relative_to(folder if folder.is_dir() else PACKAGE)
            lines.append(f"- `{shown}`: {sentence}")
    return "\n".join(lines).strip()


def page_with(text: str, name: str, content: str) -> str:
    """The page with `content` between the markers of a generated part."""
    marked = re.compile(rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not marked.search(text):
        raise ValueError(f"docs/design.md has no part <!-- generated: {name} -->")
    return marked.sub(lambda match: f"{match.group(1)}{content}\n{match.group(2)}", text)


def design_page() -> str:
    """docs/design.md with its generated parts as the code is now."""
    text = PAGE.read_text(encoding="utf-8")
    return page_with(page_with(text, "arrows", arrow_table()), "files", file_map())


if __name__ == "__main__":
    PAGE.write_text(design_page(), encoding="utf-8")
