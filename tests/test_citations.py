"""Every citation can be followed: pages and their headings, tests, and what `Source:` and `Parity:` name.

A page is cited as `docs/reference/eva.md#lamb`; further headings of it may follow as `#masks`. A source is a paper by
its arXiv number, an address, a page under docs/, a file of a public repository, an issue of one, or a book with its
year and section. Pages and files of a public repository are told by the first part of their path.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("evatool", "recipes", "docs", "tests")
SUFFIXES = {".py", ".toml", ".md", ".json"}

# First parts of paths in baaivision/EVA and in libraries: such a path is a public repository's and not ours.
PUBLIC_ROOTS = (
    *("EVA-01", "EVA-02", "EVA-CLIP", "EVA-CLIP-18B"),
    *("timm", "open_clip", "open_clip_train", "clip_benchmark", "deepspeed", "torchvision"),
)
PUBLIC_REPOSITORY = re.compile(r"\b[\w.-]+/[\w.-]+: `?[\w./{},-]+\.\w+")  # owner/name: path
PUBLIC_PATH = re.compile(rf"(?<![\w/.-])(?:{'|'.join(map(re.escape, PUBLIC_ROOTS))})/[\w./{{}},-]*\w")
PAPER = re.compile(r"\d{4}\.\d{5}\b")
ADDRESS = re.compile(r"https://[\w.-]+/\S+")
ISSUE = re.compile(r"\b[\w.-]+/[\w.-]+ (?:issues?|pull requests?) \d+")
BOOK = re.compile(r"\b(?:19|20)\d\d, (?:section |chapter )?\d+(?:\.\d+)*")
OWN_PAGE = re.compile(r"\bdocs/[\w/-]+\.md")
SOURCES = (PAPER, ADDRESS, ISSUE, BOOK, OWN_PAGE, PUBLIC_REPOSITORY, PUBLIC_PATH)

# A page: perhaps a path, then perhaps headings of it. A name alone in quotation marks is code.
PAGE = re.compile(
    r"(?:(?<=\"{3})|(?<![\w/.#{}\"'-]))((?:[\w.-]+/)*[\w-]+\.md)\b((?:#[\w-]+)?(?:(?:,| and|,? or|;) #[\w-]+)*)"
)
TEST_PATH = re.compile(r"(?<![\w/.-])(?:tests/)(?:\w+/)*test_\w+\.py\b")
OWN_PATH = re.compile(r"(?<![\w/.-])evatool/(?:\w+/)*\w+\.(?:py|toml)\b")
FAULT_ROWS = re.compile(r"((?:R\d+[ ,]*(?:and|to)?[ ,]*)+)of docs/faults\.md")
LABEL = re.compile(r"(?<![\w.`])(Source|Parity):")
# A label's text ends with its paragraph, with the next label, or with the docstring.
LABEL_END = re.compile(
    r'\n\s*#?\s*\n|"""|(?<![\w.])(?:Source|Parity|Tests?|Args|Returns|Raises|Attributes):|\n\s*\w+: '
)

WRITTEN_BY_RUNS = {"results.md", "result.md"}  # pages that evatool and its benchmarks write


def files() -> list[Path]:
    """What is read here, but for this file, whose examples are broken on purpose."""
    own = [path for place in PLACES for path in sorted((ROOT / place).rglob("*")) if path.suffix in SUFFIXES]
    return [path for path in (*own, *sorted(ROOT.glob("*.md"))) if path != Path(__file__).resolve()]


@cache
def anchors(page: Path) -> frozenset[str]:
    """Names that headings of a page have as links, as GitHub makes them, and ids that the page sets itself."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found: list[str] = re.findall(r'<a id="([\w-]+)"', text)
    seen: Counter[str] = Counter()
    for heading in re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return frozenset(found)


def unwrapped(text: str) -> str:
    """Lines that were wrapped, joined again; comment signs at their beginnings are left out."""
    return re.sub(r"\n[ \t]*(?:# )?", " ", text)


def page_problems(text: str, path: Path) -> Iterator[str]:
    """Pages and headings that `text` of the file `path` names and that are not there."""
    for page, headings in PAGE.findall(PUBLIC_REPOSITORY.sub("", unwrapped(text))):
        if page in WRITTEN_BY_RUNS or page.split("/")[0] in PUBLIC_ROOTS:
            continue
        # A page may name its neighbours; everything else starts at the root.
        places = [ROOT / page, *([path.parent / page] if path.suffix == ".md" else [])]
        found = next((place.resolve() for place in places if place.is_file()), None)
        if found is None:
            yield f"{page} is no page of this repository"
            continue
        names = re.findall(r"#([\w-]+)", headings)
        yield from (f"{page} has no heading #{name}" for name in names if name not in anchors(found))


def path_problems(text: str) -> Iterator[str]:
    """Tests and files of the package that `text` names and that are not there."""
    for named in (*TEST_PATH.findall(text), *OWN_PATH.findall(text)):
        if not (ROOT / named).is_file():
            yield f"{named} does not exist"
    for rows in FAULT_ROWS.findall(unwrapped(text)):
        known = anchors(ROOT / "docs/faults.md")
        yield from (f"faults.md has no row {row}" for row in re.findall(r"R\d+", rows) if row.lower() not in known)


def label_problems(text: str) -> Iterator[str]:
    """`Source:` without anything that can be looked up, `Parity:` without a test."""
    for label in LABEL.finditer(text):
        if re.search(r"class \w*$", text[: label.start()]):
            continue
        end = LABEL_END.search(text, label.end())
        said = unwrapped(text[label.end() : end.start() if end else len(text)]).strip()
        if label.group(1) == "Parity":
            if not TEST_PATH.search(said):
                yield f"Parity names no test: {said!r}"
        elif not any(kind.search(said) for kind in SOURCES):
            yield f"Source names nothing that can be looked up: {said!r}"


def problems(text: str, path: Path) -> list[str]:
    """All citations of `text` that lead nowhere."""
    return [*page_problems(text, path), *path_problems(text), *label_problems(text)]


@pytest.mark.parametrize("place", [*PLACES, "."])
def test_every_citation_can_be_followed(place: str) -> None:
    folder = ROOT / place
    own = [path for path in files() if (path.parent == ROOT if place == "." else path.is_relative_to(folder))]
    assert own
    found = [f"{path.relative_to(ROOT)}: {line}" for path in own for line in problems(path.read_text("utf-8"), path)]
    assert found == [], "\n".join(found)


def test_there_are_citations() -> None:
    texts = {path: path.read_text("utf-8") for path in files() if path.is_relative_to(ROOT / "evatool")}
    labels = Counter(label for text in texts.values() for label in LABEL.findall(text))
    assert labels["Source"] >= 30
    assert labels["Parity"] >= 8
    cited = [headings for text in texts.values() for page, headings in PAGE.findall(unwrapped(text)) if headings]
    assert len(cited) >= 40


@pytest.mark.parametrize(
    "text",
    [
        "Cosine decay (schedules.md 3.1).",
        "See docs/reference/eva.md#no-such-heading.",
        "See docs/reference/eva.md#lamb and #no-such-heading.",
        "See docs/reference/eva.md#lamb,\n    # #no-such-heading.",
        "See docs/no-such-page.md.",
        "Held by tests/optim/test_no_such.py.",
        "Counted in evatool/no_such.py.",
        "Rows R4 and R99 of docs/faults.md.",
        "Source: the paper.",
        "Source: some docstring.\n    Parity: tests/test_citations.py",
        "Parity: by hand.",
    ],
)
def test_what_leads_nowhere_is_found(text: str) -> None:
    assert problems(text, ROOT / "evatool/api.py")


@pytest.mark.parametrize(
    "text",
    [
        "See docs/reference/eva.md#lamb, #masks and\n    #mim-loss.",
        "Rows R4, R6 and R10 of docs/faults.md.",
        "Source: EVA (arXiv 2211.07636, section 2). Parity: tests/test_citations.py.",
        "Source: EVA-02/asuka/rope.py, as run.",
        "Source: allenai/OLMo-core: src/olmo_core/train/trainer.py.",
        "Source: mlfoundations/open_clip issues 980 and 1047.",
        "Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, 13.3.",
        "Source: docs/reference/eva.md#masks.",
        "The table goes to results.md.",
    ],
)
def test_what_leads_somewhere_is_let_pass(text: str) -> None:
    assert problems(text, ROOT / "evatool/api.py") == []
