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
from evatool.recipe.schema import RECIPES
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


def test_every_key_has_a_meaning() -> None:
    def sections(section: type[Section]) -> set[type[Section]]:
        found = {section}
        for child in Section.__subclasses__():
            found.add(child)
        return found

    silent = [
        f"{section.__name__}.{key}"
        for recipe in RECIPES.values()
        for section in sections(recipe)
        for key, field in section.model_fields.items()
        if key not in ("kind", "stage") and not field_doc(section, key) and not _is_table(field.annotation)
    ]
    assert not sorted(set(silent))


def _is_table(annotation: object) -> bool:
    return "Section" in str(annotation) or "Objective" in str(annotation) or "Source" in str(annotation)
