"""`resolved.toml` reads back equal."""

from __future__ import annotations

import functools
import tomllib
import types
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from evatool.recipe import schema
from evatool.recipe.load import load_recipe
from evatool.recipe.write import flatten, format_value, to_table, to_toml


def values(annotation: Any) -> st.SearchStrategy[Any]:
    """Anything the annotation's type allows; bounds are left to the schema, which refuses what breaks them."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:  # a bounded number: nearly all that a list holds must be above 0
        base = typing.get_args(annotation)[0]
        return st.integers(1, 9) if base is int else values(base)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values(a) for a in typing.get_args(annotation)])
    if origin is typing.Literal:
        return st.sampled_from(typing.get_args(annotation))
    if origin is dict:
        keys, held = typing.get_args(annotation)
        return st.dictionaries(_keys(keys), values(held), min_size=1, max_size=2)
    if origin is list:
        return st.lists(values(typing.get_args(annotation)[0]), min_size=1, max_size=3)
    if origin is tuple and typing.get_args(annotation)[-1] is Ellipsis:
        return st.lists(values(typing.get_args(annotation)[0]), min_size=1, max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, typing.get_args(annotation))).map(sorted).map(tuple)
    if isinstance(annotation, type) and issubclass(annotation, schema.Section):
        return sections(annotation)
    if annotation is type(None):
        return st.none()
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        return st.one_of(st.integers(1, 9), st.integers(-(2**62), 2**62))
    if annotation is float:
        return st.one_of(st.floats(0, 1), st.sampled_from([0.0, -0.0, 1.0, 1e-300, 5e-324, 0.1, 1 / 3]))
    if annotation is Path:
        return st.text(max_size=12).filter(lambda text: "\0" not in text).map(Path)
    assert annotation is str, annotation
    return st.text(min_size=1, max_size=12)


def _keys(annotation: Any) -> st.SearchStrategy[str]:
    for item in getattr(annotation, "__metadata__", ()):
        for rule in getattr(item, "metadata", ()):
            if getattr(rule, "pattern", None):
                return st.from_regex(rule.pattern, fullmatch=True, alphabet="abz_09")
    return st.text(max_size=8)


# Of these fields a section has exactly one.
ONE_OF = {schema.TrainDataSection: ("train", "sources"), schema.DistillRecipe: ("teacher", "teachers")}

# Fields of which the schema refuses nearly every text.
NARROWER = {schema.ExtraMember: {"member": st.sampled_from(["json.npy", "é.npy", "a.b.safetensors"])}}


@st.composite
def sections(draw: st.DrawFn, section: type[schema.Section]) -> schema.Section:
    """A valid section: fields that the schema refuses, alone or together, are left out until it accepts the rest."""
    one_of = ONE_OF.get(section, ())
    chosen = draw(st.sampled_from(one_of)) if one_of else None
    drawn = {
        name: draw(strategy.filter(lambda value: value is not None) if name == chosen else strategy)
        for name, strategy in _fields(section).items()
        if name == chosen or name not in one_of
    }
    optional = [name for name in drawn if name != chosen and not section.model_fields[name].is_required()]
    for name in [None, *draw(st.permutations(optional))]:
        drawn.pop(name, None)
        try:
            return section.model_validate(drawn)
        except ValidationError as error:
            for item in error.errors():
                if item["loc"] and item["loc"][0] in optional:
                    drawn.pop(str(item["loc"][0]), None)
    try:
        return section.model_validate(drawn)
    except ValidationError:
        assume(False)
        raise


@functools.cache  # building the strategies takes longer than drawing from them
def _fields(section: type[schema.Section]) -> dict[str, st.SearchStrategy[Any]]:
    fields = {name: _field(field) for name, field in section.model_fields.items()}
    return fields | NARROWER.get(section, {})


def _field(field: FieldInfo) -> st.SearchStrategy[Any]:
    bounds = {type(m).__name__: m for m in field.metadata}
    if field.annotation in (int, float) and bounds:
        low = getattr(bounds.get("Ge"), "ge", 0)
        high = getattr(bounds.get("Le") or bounds.get("Lt"), "le", 0.99 if "Lt" in bounds else 100)
        return st.integers(max(1, low), 100) if field.annotation is int else st.floats(max(low, 1e-12), high)
    return values(field.annotation)


def _reads_back_equal(recipe: Any, path: Path) -> None:
    origins = dict.fromkeys(flatten(to_table(recipe)), "a\nfile # 'x'")
    for text in (to_toml(recipe), to_toml(recipe, origins=origins, docs=True)):
        path.write_text(text, encoding="utf-8")
        again = load_recipe(path).recipe
        assert flatten(to_table(again)) == flatten(to_table(recipe))
        assert again == recipe


@pytest.mark.parametrize("stage", schema.RECIPES)
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_valid_recipe_reads_back_equal(stage: str, data: st.DataObject, tmp_path_factory: Any) -> None:
    _reads_back_equal(data.draw(sections(schema.RECIPES[stage])), tmp_path_factory.getbasetemp() / f"{stage}.toml")


@pytest.mark.slow
@pytest.mark.parametrize("stage", schema.RECIPES)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_many_valid_recipes_read_back_equal(stage: str, data: st.DataObject, tmp_path_factory: Any) -> None:
    _reads_back_equal(data.draw(sections(schema.RECIPES[stage])), tmp_path_factory.getbasetemp() / f"{stage}.toml")


@given(st.text(), st.text(), st.floats(allow_nan=False), st.integers(-(2**63), 2**63 - 1), st.booleans())
def test_any_value_reads_back_equal(key: str, text: str, number: float, count: int, flag: bool) -> None:
    value = {"text": text, "list": [number, -0.0], "table": {key: count, "flag": flag}, "empty": {}, "none": []}
    assert tomllib.loads(f"value = {format_value(value)}") == {"value": value}


def test_sections_stand_in_the_order_the_data_flows() -> None:
    text = to_toml(load_recipe("demo/distill").recipe)
    headers = [line[1:-1] for line in text.splitlines() if line.startswith("[") and "." not in line]
    assert headers == ["data", "model", "teacher", "objective", "optim", "schedule", "train", "checkpoint", "engine"]
    assert text.startswith('stage = "distill"\nsource = ')


def test_absent_values_are_left_out() -> None:
    recipe = load_recipe("demo/export").recipe
    assert recipe.run_dir is None
    assert "run_dir" not in to_toml(recipe)


def test_docs_describe_keys_and_tables() -> None:
    text = to_toml(load_recipe("demo/train-clip").recipe, docs=True)
    assert "# Peak learning rate, reached at the end of the warm-up.\nlr = " in text
    assert "\n# Length, batch and precision of the run.\n[train]\n" in text


def test_the_schema_and_this_test_know_the_same_types() -> None:
    """A field of a type that `values` cannot draw would silently narrow the property above."""
    for recipe in schema.RECIPES.values():
        for field in recipe.model_fields.values():
            values(field.annotation)


def test_a_training_checkpoint_s_export_is_read_again(tmp_path: Path) -> None:
    """Its written recipe has the defaults, of which none may count as asked for."""
    recipe = schema.ExportRecipe(export=schema.ExportSection(checkpoint="runs/x", format="deepspeed"))
    path = tmp_path / "resolved.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    assert load_recipe(path).recipe == recipe
    with pytest.raises(ValidationError, match="tolerance"):
        schema.ExportSection(checkpoint="runs/x", format="deepspeed", tolerance=0.1)
