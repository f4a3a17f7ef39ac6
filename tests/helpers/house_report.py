"""The state of the house in figures: `python tests/helpers/house_report.py [--before COMMIT] [--list]`.

Counts what style and habit ask of the package: citations that lead nowhere, names of the old vocabulary, public names
that are defined twice, long functions, and comments where the maths is dense. `tests/test_house.py` holds the goals.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import tokenize
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BEFORE = "b034c17"
"""The last commit of the old house."""

# Left column of the vocabulary table: identifiers by whole parts between underscores, capitals split off.
OLD_IDENTIFIERS = re.compile(
    r"(^|_)(held|gathered|divided|divides|divide_weights|replicas|whole_weights|deferred|first_weights|give_memory"
    r"|luggage|in_step|together|places|spares?|more_views|pictures?|answers|measures|figures|localised|localise"
    r"|odd|tar_runs|foreign_names|tensorfile|torchfile)(_|$)"
    r"|Held(State|Piece)|FirstWeights|DeferredBuild|Pictures?\b|Pictures?[A-Z]|Answers?\b|Localised"
)
OLD_MODULES = {
    *(
        "face",
        "replicated",
        "sharded",
        "zero",
        "held",
        "divided",
        "deferred",
        "answers",
        "words",
        "measures",
        "figures",
    ),
    *("sets", "localised", "ranks", "records", "members", "tars", "tar_runs", "steps", "order", "odd_pictures"),
    *("pictures", "eval_pictures", "mim_pictures", "cached", "gate", "accumulation", "saving", "derived"),
    *("foreign_names", "detect", "selection", "pickles", "tensorfile", "torchfile", "types", "pixels"),
}
ALLOWED_MODULES = {"evatool/data/eval/tars.py"}  # evaluation sets that lie in tars
# Identifiers that are another's: torch, the standard library, or a word of another trade.
FOREIGN_IDENTIFIERS: set[str] = set()
PAGES = {"README.md", "results.md", "LICENSES.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"}
DENSE = {
    "infonce": ("objective/tiled/infonce.py", "objective/infonce.py"),
    "sigmoid loss": ("objective/tiled/sigmoid.py", "objective/sigmoid.py"),
    "divergence": ("objective/tiled/divergence.py", "objective/distill_logits.py"),
    "relation": ("objective/tiled/relation.py", "objective/distill_relations.py"),
    "tiles": ("objective/tiled/tiles.py", "objective/tiles.py"),
    "order of samples": ("data/train/shuffle.py", "data/order.py"),
    "LAMB": ("optim/lamb.py", "optim/lamb.py"),
    "meta initialisation": ("distributed/engines/meta_init.py", "distributed/deferred.py"),
    "text grouping": ("model/text.py", "objective/text.py"),
    "bootstrap": ("eval/intervals.py", "eval/intervals.py"),
}


@dataclass
class House:
    """What was found in one tree; each entry says where."""

    dangling: list[str] = field(default_factory=list)
    identifiers: dict[str, list[str]] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    recipe_keys: list[str] = field(default_factory=list)
    twice: dict[str, list[str]] = field(default_factory=dict)
    long_functions: list[str] = field(default_factory=list)
    comments: dict[str, float] = field(default_factory=dict)
    files: int = 0


def inspect(root: Path) -> House:
    """The figures of the tree at `root`."""
    house = House()
    package = root / "evatool"
    defined: dict[str, list[str]] = defaultdict(list)
    pages = {path.name for path in (root / "docs").rglob("*.md")}
    tests = {str(path.relative_to(root)) for path in (root / "tests").rglob("*.py")}
    identifiers: dict[str, list[str]] = defaultdict(list)
    for path in sorted(package.rglob("*.py")):
        house.files += 1
        name = str(path.relative_to(root))
        text = path.read_text(encoding="utf-8")
        house.dangling += [f"{name}: {cited}" for cited in dangling_citations(text, root, pages, tests)]
        if path.stem in OLD_MODULES and name not in ALLOWED_MODULES:
            house.modules.append(name)
        for word in python_names(text):
            if OLD_IDENTIFIERS.search(word) and word not in FOREIGN_IDENTIFIERS:
                identifiers[word].append(name)
        tree = ast.parse(text)
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                defined[node.name].append(name)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > 60:
                    house.long_functions.append(f"{name}: {node.name} ({lines} lines)")
    for path in sorted((root / "recipes").rglob("*.toml")):
        for key in re.findall(r"^\s*\[?([a-z_.]+)\]?\s*(?:=|$)", path.read_text(encoding="utf-8"), re.MULTILINE):
            if OLD_IDENTIFIERS.search(key.replace(".", "_")):
                house.recipe_keys.append(f"{path.relative_to(root)}: {key}")
    house.identifiers = dict(identifiers)
    house.twice = {name: sorted(set(found)) for name, found in defined.items() if len(set(found)) > 1}
    for title, names in DENSE.items():
        for name in names:
            if (package / name).exists():
                house.comments[title] = comment_share((package / name).read_text(encoding="utf-8"))
                break
    return house


def python_names(text: str) -> set[str]:
    """Identifiers of a file, keywords left out."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {token.string for token in tokens if token.type == tokenize.NAME}


def dangling_citations(text: str, root: Path, pages: set[str], tests: set[str]) -> list[str]:
    """Pages and tests that a file names and that are not in the tree."""
    found = [page for page in re.findall(r"\b[\w-]+\.md\b", text) if page not in pages | PAGES]
    return found + [test for test in re.findall(r"\btests/[\w/]+\.py\b", text) if test not in tests]


def comment_share(text: str) -> float:
    """Whole-line comments among the lines that are neither blank nor docstring."""
    tree = ast.parse(text)
    inside: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            first = node.body[0]
            inside |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines = [line.strip() for number, line in enumerate(text.splitlines(), 1) if line.strip() and number not in inside]
    return sum(line.startswith("#") for line in lines) / max(1, len(lines))


def inspect_commit(commit: str) -> House:
    """The figures of a commit, from an archive of its tree."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
        return inspect(Path(folder))


def rows(house: House) -> dict[str, str]:
    """The figures by title."""
    return {
        "Python files of the package": str(house.files),
        "dangling citations": str(len(house.dangling)),
        "identifiers of the old vocabulary": str(len(house.identifiers)),
        "module names of the old vocabulary": str(len(house.modules)),
        "recipe keys of the old vocabulary": str(len(house.recipe_keys)),
        "public names defined twice": str(len(house.twice)),
        "functions over 60 lines": str(len(house.long_functions)),
        **{f"comment lines, {title}": f"{share:.0%}" for title, share in house.comments.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--before", default=BEFORE, help="commit to set beside the working tree")
    parser.add_argument("--list", action="store_true", help="also name what was found in the working tree")
    options = parser.parse_args()
    now = inspect(ROOT)
    after = rows(now)
    try:
        before = rows(inspect_commit(options.before))
    except subprocess.CalledProcessError:
        print(f"{options.before} is not in this clone; only the working tree is counted", file=sys.stderr)
        before = dict.fromkeys(after, "?")
    width = max(map(len, after))
    print(f"{'':{width}}  {'before':>8}  {'now':>8}")
    for title, value in after.items():
        print(f"{title:{width}}  {before.get(title, '-'):>8}  {value:>8}")
    if options.list:
        for title, found in {
            "dangling": now.dangling,
            "identifiers": [f"{name}: {', '.join(sorted(set(places)))}" for name, places in now.identifiers.items()],
            "modules": now.modules,
            "recipe keys": now.recipe_keys,
            "twice": [f"{name}: {', '.join(places)}" for name, places in now.twice.items()],
            "long": now.long_functions,
        }.items():
            print(f"\n{title}")
            for line in found:
                print(f"  {line}")


if __name__ == "__main__":
    main()
