"""Every recipe of a published model against a table of what was published (docs/reference/eva.md#parameter-counts,
#mim-recipes, #clip-recipes, #eva-clip-8b-and-18b, #clip-data and #parameter-groups).
"""

from __future__ import annotations

import tomllib
from typing import NamedTuple

import pytest
import torch

from evatool.model.clip import build_clip
from evatool.model.mim import build_mim
from evatool.model.presets import resolve_preset
from evatool.recipe.load import find_recipes_dir, list_recipes, load_recipe

M, B = 10**6, 10**9


class Clip(NamedTuple):
    """One row of docs/reference/eva.md#clip-recipes or #eva-clip-8b-and-18b."""

    parameters: int
    batch: int
    samples: int
    lrs: tuple[float, float]
    layer_decays: tuple[float, float]
    patch_dropout: float
    data: tuple[str, ...]


MERGED_2B = ("laion-2b", "coyo-700m")
LAION_2B = ("laion-2b",)
CLIP = {
    "eva01-clip-g-14": Clip(
        1_136_435_841, 40_960, 11 * B, (4e-4, 4e-5), (0.85, 0.75), 0.0, ("laion-400m",)
    ),  # no command: batch 41K and length by the report and the name
    "eva01-clip-g-14-plus": Clip(1_366_621_569, 114_688, 11 * B, (4e-4, 4e-5), (0.85, 0.75), 0.5, MERGED_2B),
    "eva02-clip-b-16": Clip(149_691_137, 131_072, 8 * B, (2e-4, 2e-5), (0.75, 0.75), 0.0, MERGED_2B),
    "eva02-clip-l-14": Clip(427_755_457, 131_072, 4 * B, (4e-4, 4e-5), (0.85, 0.75), 0.0, MERGED_2B),
    "eva02-clip-l-14-336": Clip(428_083_137, 61_440, 2 * B, (4e-4, 4e-5), (0.75, 0.65), 0.0, MERGED_2B),
    "eva02-clip-e-14": Clip(4_704_589_569, 115_200, 4 * B, (4e-4, 4e-5), (0.9, 0.75), 0.5, LAION_2B),
    "eva02-clip-e-14-plus": Clip(5_044_889_089, 144_000, 9 * B, (4e-4, 4e-5), (0.9, 0.75), 0.5, LAION_2B),
    "eva-clip-8b": Clip(8_220_748_545, 178_176, 9 * B, (4e-4, 4e-5), (0.9, 0.75), 0.5, MERGED_2B),
    "eva-clip-8b-448": Clip(8_223_894_273, 24_576, 800 * M, (2e-4, 2e-5), (0.85, 0.75), 0.0, MERGED_2B),
    "eva-clip-18b": Clip(18_325_482_241, 108_000, 6 * B, (4e-4, 4e-5), (0.9, 0.75), 0.5, (*MERGED_2B, "laion-coco")),
    "eva-clip-18b-336": Clip(18_327_120_641, 23_040, 400 * M, (2e-4, 2e-5), (0.85, 0.75), 0.0, MERGED_2B),
}
FIXED_TEMPERATURE = {"eva-clip-8b", "eva-clip-8b-448", "eva-clip-18b", "eva-clip-18b-336"}
GPUS = {  # of the released commands
    "eva01-clip-g-14-plus": 112,
    "eva02-clip-b-16": 64,
    "eva02-clip-l-14": 128,
    "eva02-clip-l-14-336": 128,
    "eva02-clip-e-14": 144,
    "eva02-clip-e-14-plus": 144,
}
COMMAND_SAMPLES = {"eva01-clip-g-14-plus": 4 * B, "eva02-clip-e-14-plus": 4 * B}  # where the name says otherwise


class Mim(NamedTuple):
    """One row of docs/reference/eva.md#mim-recipes."""

    parameters: int
    batch: int
    samples: int
    lr: float
    warmup_epochs: int
    epochs: int
    drop_path: float
    zero_stage: int


MIM = {
    "eva-01-g": Mim(1_012_229_632, 4096, 150 * 30 * M, 1e-3, 2, 150, 0.1, 1),
    "eva-l": Mim(316_576_768, 4096, 150 * 14_200_000, 2.4e-3, 2, 150, 0.0, 1),  # batch and ZeRO stage: our choice
    "eva-02-ti": Mim(5_699_968, 4000, 240 * 14_200_000, 3e-3, 1, 240, 0.0, 0),
    "eva-02-s": Mim(22_015_744, 4000, 240 * 14_200_000, 3e-3, 1, 240, 0.0, 0),
    "eva-02-b": Mim(86_546_944, 2048, 150 * 14_200_000, 1.5e-3, 1, 150, 0.0, 0),
    "eva-02-l": Mim(304_319_424, 2048, 150 * 14_200_000, 1.5e-3, 1, 150, 0.1, 1),
    "eva-02-l-m38m": Mim(304_319_424, 2048, 56 * 38 * M, 1.5e-3, 1, 56, 0.1, 1),
}
# Teacher and length alone were published, or nothing.
MIM_UNPUBLISHED = {"eva-02-e": 4_350_558_720, "eva-8b": 7_525_045_248, "eva-18b": 17_627_879_424}


def recipe_of(name: str):
    return load_recipe(name).recipe


def meta_parameters(preset: str) -> int:
    config = resolve_preset(preset)
    with torch.device("meta"):
        model = build_clip(config) if config.task == "clip" else build_mim(config, predict_dim=config.predict_dim)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", CLIP)
def test_clip(name):
    row, recipe = CLIP[name], recipe_of(f"{name}/train-clip")
    train, optim = recipe.train, recipe.optim
    assert meta_parameters(recipe.model.preset) == row.parameters
    assert (train.global_batch_size, train.samples_seen) == (row.batch, row.samples)
    assert train.num_steps == row.samples // row.batch
    assert recipe.schedule.kind == "warmup-cosine"
    assert recipe.schedule.warmup_samples == 2000 * row.batch
    assert (recipe.schedule.min_lr_fraction, optim.grad_clip_norm) == (0.0, 5.0)
    assert (optim.visual.lr, optim.text.lr) == row.lrs
    assert (optim.visual.layer_decay, optim.text.layer_decay) == row.layer_decays
    assert recipe.model.patch_dropout == row.patch_dropout
    assert tuple(source.name for source in recipe.data.sources) == row.data
    assert (recipe.data.augment.crop_scale, recipe.data.augment.horizontal_flip) == ((0.9, 1.0), 0.0)
    is_late = name in FIXED_TEMPERATURE
    decay = 0.0 if is_late else 0.05
    assert [group.weight_decay for group in (optim.visual, optim.text)] == [decay] * 2
    # the temperature, which does not learn in the late models
    assert (optim.other is None) if is_late else ((optim.other.lr, optim.other.weight_decay) == (5e-4, 0.05))
    assert (optim.kind, optim.betas, optim.eps) == ("lamb", (0.9, 0.95 if is_late else 0.98), 1e-6)
    assert recipe.objective.temperature.kind == ("fixed" if is_late else "learned")
    assert recipe.engine.zero_stage == (3 if is_late else 1)


@pytest.mark.parametrize("name", [name for name in CLIP if CLIP[name].data == MERGED_2B])
def test_merged_2b_is_mixed_four_to_one(name):
    data = recipe_of(f"{name}/train-clip").data
    assert [source.weight for source in data.sources] == [1.6e9, 0.4e9]
    assert (data.mixing, data.sampling) == ("samples", "with-replacement")


def test_18b_reads_laion_coco_at_the_end():
    data = recipe_of("eva-clip-18b/train-clip").data
    assert [source.weight for source in data.sources] == [1.6e9, 0.4e9, 0.0]
    assert [(phase.from_samples, phase.weights["laion-coco"]) for phase in data.phases] == [(5.4e9, 20e6)]


@pytest.mark.parametrize("name", GPUS)
def test_faithful_overlay_is_the_printed_command(name):
    recipe, ours = recipe_of(f"{name}/train-clip-faithful"), recipe_of(f"{name}/train-clip")
    assert (recipe.optim.betas, recipe.optim.eps) == ((0.9, 0.999), 1e-8)
    assert (recipe.optim.granularity, recipe.optim.virtual_world_size) == ("flat-shard", GPUS[name])
    assert recipe.train.samples_seen == COMMAND_SAMPLES.get(name, ours.train.samples_seen)
    assert recipe.data.mixing == ("alternating" if len(recipe.data.sources) > 1 else "samples")
    # the loader passed over OpenCLIP's text towers (docs/reference/eva.md#text-towers-that-are-not-loaded)
    if "e-14" in name or "g-14-plus" in name:
        assert recipe.model.init.text is None
        assert ours.model.init.text is not None


@pytest.mark.parametrize("name", MIM)
def test_mim(name):
    row, recipe = MIM[name], recipe_of(f"{name}/pretrain-mim")
    assert meta_parameters(recipe.model.preset) == row.parameters
    assert (recipe.train.global_batch_size, recipe.train.samples_seen) == (row.batch, row.samples)
    assert recipe.schedule.warmup_samples * row.epochs == row.samples * row.warmup_epochs
    assert recipe.schedule.min_lr_fraction * row.lr == pytest.approx(1e-5)
    optim = recipe.optim
    beta2 = 0.95 if name == "eva-l" else 0.98
    assert (optim.kind, optim.betas, optim.eps, optim.grad_clip_norm) == ("adamw", (0.9, beta2), 1e-6, 3.0)
    assert (optim.visual.lr, optim.visual.weight_decay, optim.visual.layer_decay) == (row.lr, 0.05, 1.0)
    assert recipe.model.drop_path_rate == row.drop_path
    assert recipe.engine.zero_stage == row.zero_stage
    assert recipe.model.patch_embed_grad_scale == (1.0 if name in ("eva-01-g", "eva-l") else 0.1)
    masks = ("random", 0.75) if name == "eva-l" else ("blocks", 0.41)
    assert (recipe.objective.masking, recipe.objective.mask_ratio) == masks
    assert recipe.objective.min_block_fraction == 0.0625
    assert (recipe.data.augment.crop_scale, recipe.data.augment.horizontal_flip) == ((0.2, 1.0), 0.5)


@pytest.mark.parametrize("name", MIM_UNPUBLISHED)
def test_mim_without_a_released_command(name):
    recipe = recipe_of(f"{name}/pretrain-mim")
    assert meta_parameters(recipe.model.preset) == MIM_UNPUBLISHED[name]
    assert recipe.train.samples_seen == (2_130_000_000 if name == "eva-02-e" else 6 * B)
    assert "our choice" in recipe.source


def test_every_published_recipe_is_in_the_tables():
    own = {name.rpartition("/")[0] for name, stage, _ in list_recipes() if stage in ("pretrain-mim", "train-clip")}
    folders = {folder for folder in own if not folder.startswith(("demo", "debug", "evidence"))}
    assert folders == set(CLIP) | set(MIM) | set(MIM_UNPUBLISHED)


@pytest.mark.parametrize("name", CLIP)
def test_the_chain_goes_on_to_export_and_eval(name):
    run = f"runs/{name}/train-clip"
    assert recipe_of(f"{name}/export").export.checkpoint == run
    assert list(recipe_of(f"{name}/eval").eval.models.values()) == [run]


def test_what_a_recipe_starts_from_is_another_recipes_run():
    names = {f"runs/{name}" for name, _, _ in list_recipes()}
    for name, stage, _ in list_recipes():
        if stage != "train-clip" or name.startswith(("demo", "evidence")):
            continue
        init = recipe_of(name).model.init
        paths = [init.path] if init.kind in ("clip", "image-tower") else []
        paths += [init.image.path] if init.kind == "towers" and init.image else []
        assert {str(path) for path in paths} <= names, name


@pytest.mark.parametrize("name", [*CLIP, *MIM, *MIM_UNPUBLISHED])
def test_every_number_has_a_source(name):
    """Figures of a published recipe's own file stand beside the place they are from."""
    stage = "train-clip" if name in CLIP else "pretrain-mim"
    path = find_recipes_dir() / name / f"{stage}.toml"
    text = path.read_text(encoding="utf-8")
    assert tomllib.loads(text)["source"]
    section = ""
    for line in text.splitlines():
        section = line if line.startswith("[") else section
        is_number = not line.startswith(" ") and "=" in line and line.partition("=")[2].strip()[:1].isdigit()
        if is_number and not section.startswith("[[data"):
            assert "#" in line, f"{path.name}: {line}"


@pytest.mark.parametrize("name", [name for name, *_ in list_recipes() if name.count("/") == 2])
def test_debug_versions_differ_in_size_alone(name):
    """The debug version keeps the objective, the optimiser and the schedule's kind of what it shrinks."""
    small, full = recipe_of(name), recipe_of(name.removeprefix("debug/"))
    assert small.objective == full.objective
    assert small.optim == full.optim
    assert small.schedule.kind == full.schedule.kind
    init = getattr(full.model, "init", None)
    if init is not None and (init.kind != "towers" or init.image):  # debug versions have no text tower to start from
        assert small.model.init.kind == init.kind
    assert small.data.augment == full.data.augment
