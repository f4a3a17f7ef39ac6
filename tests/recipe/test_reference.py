"""The reference page and the JSON Schema are what the schema says."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import jsonschema
import pytest

from evatool.recipe.field_docs import field_doc
from evatool.recipe.load import find_recipes_dir
from evatool.recipe.reference import json_schema, reference_page
from evatool.recipe.schema.base import Section

DOCS = Path(__file__).parents[2] / "docs"
FILES = sorted(find_recipes_dir().rglob("*.toml"))
AGAIN = "run `make reference`"


def test_the_page_is_up_to_date() -> None:
    assert (DOCS / "recipes.md").read_text(encoding="utf-8") == reference_page(), AGAIN


def test_the_json_schema_is_up_to_date() -> None:
    assert json.loads((DOCS / "recipe.schema.json").read_text(encoding="utf-8")) == json_schema(), AGAIN


def test_the_json_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(find_recipes_dir())) for path in FILES])
def test_shipped_files_are_valid_to_an_editor(path: Path) -> None:
    jsonschema.validate(tomllib.loads(path.read_text(encoding="utf-8")), json_schema())


@pytest.mark.parametrize(
    "table",
    [
        {"train": {"sed": 1}},
        {"train": {"seed": "one"}},
        {"train": {"precision": "fp8"}},
        {"optim": {"visual": {"lr": -1.0}}},
        {"nothing": 1},
    ],
    ids=["unknown key", "type", "choice", "bound", "unknown table"],
)
def test_what_the_schema_refuses_an_editor_marks(table: dict) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(table, json_schema())


def all_sections(section: type[Section] = Section) -> set[type[Section]]:
    """Every section class, however deep its inheritance."""
    return {section, *(inner for child in section.__subclasses__() for inner in all_sections(child))} - {Section}


FIELDS = [(section, key) for section in sorted(all_sections(), key=str) for key in section.model_fields]
ELLIPTIC = ("As ", "Of ", "The same ", "Only these ")


@pytest.mark.parametrize(("section", "key"), FIELDS, ids=[f"{section.__name__}.{key}" for section, key in FIELDS])
def test_every_key_has_a_meaning_in_whole_sentences(section: type[Section], key: str) -> None:
    doc = field_doc(section, key)
    assert doc.endswith("."), "every field has a docstring of whole sentences"
    assert not doc.startswith(ELLIPTIC), f"{doc!r} is read alone: it cannot lean on another entry"


def test_every_section_is_described() -> None:
    """The first line stands alone above the table in `evatool recipe show --docs`."""
    for section in all_sections():
        first = (section.__doc__ or "").strip().splitlines()[0]
        assert first.endswith("."), section.__name__
