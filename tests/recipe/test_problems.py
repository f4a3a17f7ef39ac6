"""Every error at once, each with its file, key, value and a way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from evatool.core.errors import RecipeError
from evatool.recipe import schema
from evatool.recipe.field_docs import field_doc
from evatool.recipe.load import load_recipe
from evatool.recipe.problems import schema_keys, strip_union_tags

Write = Callable[[str, str], Path]


def problems_of(path: Path) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return caught.value.problems


def test_all_problems_of_a_recipe_and_its_base_come_at_once(write: Write) -> None:
    write("base.toml", '[train]\nsamples_seen = 4e9\nglobal_batch_size = 0\n[model]\npreset = "x"\nimage_siz = 3\n')
    child = write(
        "child.toml",
        'extends = "base.toml"\nstage = "train-clip"\noptim.lr = 1\noptim.visual.lr = true\ntrain.seed = "1"\n',
    )
    assert problems_of(child) == [
        "child.toml: data is missing (Shards to train on)",
        "child.toml: optim.visual.lr = true: expected a number",
        "child.toml: optim.lr = 1: unknown key; lr belongs to optim.visual or optim.text or optim.other",
        "base.toml: train.samples_seen = 4000000000.0: expected a whole number; write 4_000_000_000",
        "base.toml: train.global_batch_size = 0: expected greater than 0",
        'child.toml: train.seed = "1": expected a whole number',
        "base.toml: model.image_siz = 3: unknown key; did you mean model.image_size?",
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("train.mask_ratio = 0.4", "train.mask_ratio = 0.4: unknown key; mask_ratio belongs to objective.mim"),
        ("train.num_bootstrap = 9", "num_bootstrap = 9: unknown key; eval.num_bootstrap belongs to recipes for eval"),
        ("train.lr = 1", "train.lr = 1: unknown key; lr belongs to optim.visual or optim.text or optim.other"),
        ("trian.seed = 1", "trian = { seed = 1 }: unknown key; did you mean train?"),
        ("data.trian = 1", "data.trian = 1: unknown key; did you mean data.train?"),
        ("data.seed = 1", "data.seed = 1: unknown key; seed belongs to train"),
        ("teachers.big.weight = 1", "teachers = { big = { weight = 1 } }: unknown key; did you mean teacher?"),
        ('teacher.model = "x"', "recipe: [teacher] has no effect in train-clip without [objective.mim]"),
        ("engine.zzz = 1", "engine.zzz = 1: unknown key; known here: kind, processes, zero_stage"),
        ('model.init = {kind = "clip", pth = "x"}', 'model.init.pth = "x": unknown key; did you mean model.init.path?'),
        ('model.init.path = "x"', 'model.init.kind is missing (one of "clip", "image-tower", "none", "towers")'),
        ('model.init.kind = "clipp"', '"none", "image-tower", "towers", "clip"; did you mean "clip"?'),
        ('model.init = {kind = "none", path = "x"}', '; it needs model.init.kind = "image-tower" or "clip"'),
        ("model.init = 3", "model.init = 3: expected a table"),
        ("optim.betas = [0.9]", "optim.betas[1] is missing (Decay of the first and second moments"),
        ("optim.betas = [0.9, 0.9, 0.9]", "optim.betas = [0.9, 0.9, 0.9]: expected at most 2 values, found 3"),
        ("optim.betas = [0.9, 2]", "optim.betas[1] = 2: expected less than or equal to 1"),
        ("data.augment.crop_scale = [1.0, 0.5]", "data.augment: crop_scale = [1.0, 0.5] is empty"),
        ("train.seed = nan", "train.seed = nan: expected a whole number"),
        ("optim.eps = nan", "optim.eps = nan: expected a finite number"),
        ("source = 2024-01-01", "source = 2024-01-01: recipes hold no dates; quote it"),
        ("source = 3", "source = 3: expected text in quotes"),
        ("engine = 1", "engine = 1: expected a table"),
    ],
)
def test_each_kind_of_problem_has_its_own_way_out(train_clip: Path, line: str, problem: str) -> None:
    train_clip.write_text(f"{line}\n{train_clip.read_text()}")
    found = problems_of(train_clip)
    assert any(problem in text and text.startswith("mine.toml: ") for text in found), found


def test_a_key_of_another_kind_of_table_says_which(write: Write) -> None:
    path = write("a.toml", 'stage = "data-prepare"\n[data]\nkind = "drawings"\nimages = "x"\n')
    assert problems_of(path) == ['a.toml: data.images = "x": unknown key; it needs data.kind = "folder"']


def test_a_missing_text_tower_is_named(train_clip: Path) -> None:
    train_clip.write_text(train_clip.read_text().replace("optim.text.lr = 1e-3", ""))
    assert any("optim.text is missing" in line for line in problems_of(train_clip))


def test_checks_across_sections_print_both_numbers(train_clip: Path) -> None:
    train_clip.write_text(train_clip.read_text() + "schedule.warmup_samples = 2000\n")
    (line,) = problems_of(train_clip)
    assert "2000" in line
    assert "1000" in line


def test_union_tags_are_stripped_from_the_path() -> None:
    strip = strip_union_tags
    assert strip(("data", "folder", "images"), schema.DataPrepareRecipe) == (("data", "images"), "")
    assert strip(("model", "init", "clip", "path"), schema.TrainClipRecipe) == (("model", "init", "path"), "")
    assert strip(("data", "folder"), schema.DataPrepareRecipe) == (("data",), "")
    assert strip(("eval", "models", "clip", "[key]"), schema.EvalRecipe) == (("eval", "models", "clip"), "")
    assert strip(("optim", "betas", 1), schema.TrainClipRecipe) == (("optim", "betas"), "[1]")


@pytest.mark.parametrize("stage", schema.RECIPES)
def test_every_field_says_what_it_means(stage: str) -> None:
    """Messages, `recipe show --docs` and the reference show these descriptions."""
    silent = []
    sections = [schema.RECIPES[stage]]
    for key in schema_keys(schema.RECIPES[stage]):
        assert key.path
    while sections:
        section = sections.pop()
        assert section.__doc__, section
        for name, field in section.model_fields.items():
            inner = [
                s for s in vars(schema).values() if isinstance(s, type) and str(s.__name__) in str(field.annotation)
            ]
            inner = [s for s in inner if issubclass(s, schema.Section) and s is not schema.Section]
            sections += inner
            if not field_doc(section, name) and not inner and name not in ("kind", "stage"):
                silent.append(f"{section.__name__}.{name}")
    assert not silent
