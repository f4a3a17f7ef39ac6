"""Published settings, whole plans, advice and refusals."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from published_jobs import job_of

from evatool.core.errors import RecipeError, UsageError
from evatool.model.presets import PRESETS, resolve_preset
from evatool.plan.advice import choices, engines, enough_gpus, largest_micro_batch, on_ranks
from evatool.plan.estimate import memory, operations
from evatool.plan.hardware import HARDWARE_NAMES, Assumptions, hardware
from evatool.plan.job import PlannedJob, job_of_recipe, teacher_config
from evatool.plan.memory import GIB
from evatool.plan.pace import pace, traffic
from evatool.plan.published import PARAMETERS, PUBLISHED_RUNS
from evatool.plan.report import make_plan
from evatool.recipe.load import load_recipe, resolve_table
from evatool.recipe.write import to_table

RUNS = {run.name: run for run in PUBLISHED_RUNS}
ASSUMED = Assumptions()
# docs/reference/memory-and-scale.md#published-settings-by-hand: the same settings by an independent calculation, GiB
REFERENCE = {
    "B/16": 28.9,
    "L/14": 30.8,
    "L/14-336": 29.0,
    "E/14": 55.4,
    "E/14+": 68.8,
    "8B": 31.7,
    "18B": 32.4,
    "E/14, all patches": 87,
    "E/14+, all patches": 108,
    "8B, ZeRO-1": 60,
    "18B, all patches": 57,
}


def job(**changes: object) -> PlannedJob:
    base = PlannedJob("l14", "train-clip", PRESETS["EVA02-CLIP-L-14"], (), 4_000_000, 1024, 8, "autocast", "ddp")
    return replace(base, **changes)


@pytest.mark.parametrize("run", PUBLISHED_RUNS, ids=lambda run: run.name)
def test_published_settings_fit_and_controls_do_not(run) -> None:
    needed = memory(job_of(run)).total / GIB
    assert (needed <= hardware(run.gpu).memory_gib) == run.fits
    assert needed == pytest.approx(REFERENCE[run.name], rel=0.18)


def test_seven_settings_and_four_controls() -> None:
    assert [run.fits for run in PUBLISHED_RUNS].count(True) == 7
    assert [run.fits for run in PUBLISHED_RUNS].count(False) == 4
    assert set(PARAMETERS) <= set(PRESETS)


def test_18b_takes_about_what_the_reference_predicts() -> None:
    """docs/reference/memory-and-scale.md#time: 8.4e22 operations, 22 to 29 days on 360 A100 at 40 and 30 %."""
    run = job_of(RUNS["18B"])
    assert operations(run).model * run.samples_seen == pytest.approx(8.4e22, rel=0.01)
    for mfu, days in ((0.4, 22), (0.3, 29)):
        assert pace(run, hardware("a100-40"), ASSUMED, mfu).days == pytest.approx(days, rel=0.05)


def test_18b_exchanges_what_the_reference_says() -> None:
    """docs/reference/memory-and-scale.md#network: 109 GB of weights and gradients, 1.3 GB of features."""
    exchange = traffic(job_of(RUNS["18B"]), hardware("a100-40"), 40.0)
    assert exchange.weights_and_gradients / 1e9 == pytest.approx(109, rel=0.02)
    assert exchange.features / 1e9 == pytest.approx(1.3, rel=0.05)
    assert exchange.exposed_seconds < 0.05 * exchange.seconds


def test_small_models_on_many_gpus_wait_for_data() -> None:
    """docs/reference/memory-and-scale.md#data: L/14 on 256 H100 wants hundreds of loader cores, 18B a few."""
    small = job_of(RUNS["L/14"], num_gpus=256)
    gpu = replace(hardware("h100"), cores_per_gpu=1)
    assert pace(small, gpu, ASSUMED, 0.45).binding == "data"
    assert pace(job_of(RUNS["18B"]), gpu, ASSUMED, 0.45).binding == "compute"


@pytest.mark.parametrize("gpu", [name for name in HARDWARE_NAMES if name != "cpu"])
def test_every_choice_fits_and_the_fastest_is_first(gpu: str) -> None:
    device = hardware(gpu)
    found = choices(job(model=PRESETS["EVA02-CLIP-bigE-14"], num_gpus=64, global_batch_size=65536), device, ASSUMED)
    assert found
    assert all(memory(choice.job).total == choice.memory_bytes <= device.memory_gib * GIB for choice in found)
    assert all(first.step_sec <= 1.000001 * then.step_sec for first, then in itertools.pairwise(found))


def test_largest_micro_batch_is_the_largest() -> None:
    gpu = hardware("a100-40")
    big = job(global_batch_size=32768)
    batch = largest_micro_batch(big, gpu)
    assert 0 < batch < big.micro_batch_size
    assert memory(replace(big, global_batch_size=batch * 8)).total < gpu.memory_gib * GIB


def test_more_gpus_make_room() -> None:
    gpu, big = hardware("a100-40"), job(global_batch_size=32768)
    enough = enough_gpus(big, gpu)
    assert enough is not None
    assert enough > 8
    assert memory(replace(big, num_gpus=enough)).total <= gpu.memory_gib * GIB
    assert memory(replace(big, num_gpus=enough // 2)).total > gpu.memory_gib * GIB


@pytest.mark.parametrize(
    ("batch", "gpus", "enough"),
    [
        pytest.param(3 * 2**13, 8, 384, id="no power of two"),
        pytest.param(90_000, 8, 1800, id="whole machines"),
        pytest.param(450, 1, 6, id="part of a machine"),
        pytest.param(2700, 1, 36, id="divides over no whole machines"),
    ],
)
def test_the_fewest_gpus_are_advised(batch: int, gpus: int, enough: int) -> None:
    gpu, big = hardware("a100-40"), job(global_batch_size=batch, num_gpus=gpus, engine="single" if gpus == 1 else "ddp")
    assert enough_gpus(big, gpu) == enough
    assert memory(on_ranks(big, enough)).total <= gpu.memory_gib * GIB
    node = gpu.gpus_per_node
    for fewer in range(gpus, enough):
        if batch % fewer == 0 and (fewer <= node or fewer % node == 0 or batch % node):
            assert memory(on_ranks(big, fewer)).total > gpu.memory_gib * GIB
    assert f"--gpus {enough} fits" in (make_plan(big, gpu).refusal.fix or "")


def test_more_gpus_keep_a_stated_micro_batch() -> None:
    """The advised number, put into the recipe's own plan, is not refused; a machine less is."""
    settings = ["train.micro_batch_size=50", "train.global_batch_size=86400"]
    resolved = load_recipe("eva-clip-18b/train-clip", settings)
    gpu = hardware("a100-40")
    first = job_of_recipe(resolved.recipe, resolved.name, 8)
    assert enough_gpus(first, gpu) == 32
    planned = {n: job_of_recipe(resolved.recipe, resolved.name, n) for n in (24, 32)}
    assert planned[32].micro_batch_size == on_ranks(first, 32).micro_batch_size == 50
    assert make_plan(planned[32], gpu).refusal is None
    assert "--gpus 32 fits" in (make_plan(planned[24], gpu).refusal.fix or "")


def test_a_refusal_says_by_how_much_and_what_would_fit() -> None:
    big, gpu = job(global_batch_size=32768), hardware("a100-40")
    plan = make_plan(big, gpu)
    assert plan.refusal is not None
    assert plan.data["fits"] is False
    assert plan.data["binding"] == "memory"
    over = memory(big).total / GIB - gpu.memory_gib
    assert f"{over:.1f} GiB more" in plan.refusal.what
    assert "--gpus" in (plan.refusal.fix or "")
    settings = re.search(r"((?:--set \S+ ?)+) ?needs", plan.refusal.fix or "").group(1)
    assert "--set train.micro_batch_size=64" in settings
    batch = int(re.search(r"global_batch_size = (\d+) fits", plan.refusal.fix or "").group(1))
    assert batch % big.num_gpus == 0
    assert make_plan(replace(big, global_batch_size=batch), gpu).refusal is None


def test_checkpointing_and_micro_batches_come_from_the_recipe() -> None:
    settings = ["engine.activation_checkpointing=full", "train.micro_batch_size=16"]
    resolved = load_recipe("demo/train-clip", settings)
    planned = job_of_recipe(resolved.recipe, resolved.name, 2)
    assert planned.checkpointing == "full"
    assert (planned.accumulation, planned.micro_batch_size) == (4, 16)
    selective = load_recipe("demo/train-clip", ["engine.activation_checkpointing=selective"])
    assert job_of_recipe(selective.recipe, "x", 1).checkpointing == "selective"


def test_what_fits_is_not_refused_and_parts_add_up() -> None:
    plan = make_plan(job(), hardware("h100"), price_per_gpu_hour=2.5)
    assert plan.refusal is None
    held = plan.data["memory"]
    assert held["bytes"] == int(sum(held["parts"].values()) * 1.06)
    assert held["by_engine"]["ddp"]["bytes"] == held["bytes"]
    for each in plan.data["time"].values():
        assert each["cost"] == pytest.approx(2.5 * each["gpu_hours"])
        assert each["gpu_hours"] == pytest.approx(each["days"] * 24 * 8)
    assert plan.data["time"]["low"]["days"] > plan.data["time"]["likely"]["days"] > plan.data["time"]["high"]["days"]
    json.dumps(plan.data, allow_nan=False)


def test_patch_dropout_and_trimmed_captions_save_memory_and_work() -> None:
    for less in (job(patch_dropout=0.5), job(text_tokens=16), job(checkpointing="full")):
        assert memory(less).parts["activations"] < memory(job()).parts["activations"]
    assert operations(job(patch_dropout=0.5)).model < operations(job()).model
    assert operations(job(checkpointing="full")).executed == pytest.approx(4 / 3 * operations(job()).model)


@pytest.mark.parametrize("stage", ["train-clip", "pretrain-mim", "distill"])
def test_shipped_training_recipes_are_planned(stage: str) -> None:
    resolved = load_recipe(f"demo/{stage}")
    planned = job_of_recipe(resolved.recipe, resolved.name, 2)
    assert planned.num_steps == resolved.recipe.train.num_steps
    assert make_plan(planned, hardware("h100")).refusal is None


def test_a_teacher_counts(tmp_path: Path) -> None:
    known = load_recipe("demo/pretrain-mim", ['teacher.model="EVA02-CLIP-L-14"'])
    planned = job_of_recipe(known.recipe, known.name, 1)
    assert planned.model.predict_dim == 768
    assert operations(planned).teacher > 150e9
    folder = tmp_path / "checkpoints" / "step_00000001"
    folder.mkdir(parents=True)
    (folder / "model_config.json").write_text(json.dumps(resolve_preset("EVA02-CLIP-B-16").to_json()))
    there = load_recipe("demo/distill", [f'teacher.model="{tmp_path}"'])
    assert job_of_recipe(there.recipe, there.name, 1).teachers == (resolve_preset("EVA02-CLIP-B-16"),)
    gone = load_recipe("demo/distill", ['teacher.model="runs/gone"'])
    assert any("not counted" in note for note in job_of_recipe(gone.recipe, gone.name, 1).notes)


def test_released_files_are_known_by_their_names() -> None:
    resolved = load_recipe("eva02-clip-l-14/distill-two-teachers")
    planned = job_of_recipe(resolved.recipe, resolved.name, 128)
    assert [teacher.name for teacher in planned.teachers] == ["EVA02-CLIP-bigE-14-plus", "OpenCLIP-bigG-14"]
    assert memory(planned).parts["teacher"] > 4 * (5_044_889_089 + 2_539_567_362)
    for file, name in {
        "weights/EVA01_CLIP_g_14_psz14_s11B.pt": "EVA01-CLIP-g-14",
        "weights/openai-ViT-L-14.pt": "OpenCLIP-L-14",
        "weights/open_clip-ViT-H-14-laion2B-s32B-b79K.bin": "OpenCLIP-H-14",
    }.items():
        found, note = teacher_config(file)
        assert (found.name if found else None, note) == (name, None)


def test_several_teachers_count_and_stored_ones_do_not() -> None:
    teacher = ['teacher.model="EVA02-CLIP-L-14"']
    one, stored = (load_recipe("demo/distill", [*teacher, *more]) for more in ([], ["teacher.store.views=4"]))
    table = to_table(one.recipe)
    table["teachers"] = {"a": table.pop("teacher"), "b": {"model": "OpenCLIP-H-14"}}
    both = resolve_table(table, "distill")
    alone, pair, kept = (job_of_recipe(each.recipe, each.name, 1) for each in (one, both, stored))
    more = operations(pair).teacher - operations(alone).teacher
    assert more > operations(alone).teacher > 150e9
    assert memory(pair).parts["teacher"] > memory(alone).parts["teacher"] + 4 * 980e6, "H-14 has 986 M parameters"
    assert (operations(kept).teacher, memory(kept).parts["teacher"]) == (0, 0)
    assert any("only the first 4 epochs" in note for note in kept.notes)
    assert memory(kept).parts["loss"] == memory(alone).parts["loss"], "stored embeddings take part in the loss"


@pytest.mark.parametrize("name", ["demo/eval", "demo/export", "demo/data-prepare"])
def test_only_training_is_planned(name: str) -> None:
    resolved = load_recipe(name)
    with pytest.raises(UsageError, match="only training"):
        job_of_recipe(resolved.recipe, resolved.name, 1)


def test_batches_must_divide() -> None:
    resolved = load_recipe("demo/train-clip")
    with pytest.raises(RecipeError, match="does not divide over 3"):
        job_of_recipe(resolved.recipe, resolved.name, 3)


def test_unknown_hardware_is_named() -> None:
    with pytest.raises(UsageError, match="h1000"):
        hardware("h1000")


def test_engines_are_shown_as_themselves() -> None:
    """Every engine has its own column; fsdp2 needs less than ZeRO-3 by its second copy of the weights and buckets."""
    gpu, ours = hardware("h100"), job(engine="fsdp2")
    plan = make_plan(ours, gpu)
    assert set(plan.data["memory"]["by_engine"]) >= {"ddp", "fsdp2", *(f"ZeRO-{stage}" for stage in range(4))}
    sharded, zero = (memory(engines(ours)[name]).parts for name in ("fsdp2", "ZeRO-3"))
    assert sharded["optimizer"] == pytest.approx(2 / 3 * zero["optimizer"], rel=0.01)
    assert any("offload" in name for name in engines(ours))
    assert not any("offload" in name for name in engines(replace(ours, optimizer="lamb")))


@pytest.mark.parametrize(
    ("settings", "engine", "stage", "offload"),
    [
        ([], "fsdp2", 0, "none"),
        (['engine.kind="ddp"'], "ddp", 0, "none"),
        (["engine.kind=deepspeed", "engine.zero_stage=2", "engine.offload=optimizer"], "deepspeed", 2, "optimizer"),
        (
            ["engine.kind=deepspeed", "engine.zero_stage=3", "engine.offload=optimizer-and-weights"],
            "deepspeed",
            3,
            "optimizer-and-weights",
        ),
    ],
)
def test_the_engine_comes_from_the_recipe(settings: list[str], engine: str, stage: int, offload: str) -> None:
    resolved = load_recipe("demo/train-clip", settings)
    planned = job_of_recipe(resolved.recipe, resolved.name, 2)
    assert (planned.engine, planned.zero_stage, planned.offload) == (engine, stage, offload)


def test_memory_is_for_the_phase_with_most_patches() -> None:
    resolved = load_recipe("eva-clip-18b/train-clip")
    planned = job_of_recipe(resolved.recipe, resolved.name, 360)
    assert planned.dropout_shares == [(pytest.approx(0.9), 0.5), (pytest.approx(0.1), 0.0)]
    always, never = (replace(planned, patch_dropout=share, dropout_phases=()) for share in (0.5, 0.0))
    assert memory(planned).total == memory(never).total > memory(always).total
    assert operations(planned).image == pytest.approx(
        0.9 * operations(always).image + 0.1 * operations(never).image, rel=1e-6
    )


PUBLISHED_ON = {  # docs/reference/eva.md#clip-recipes and #eva-clip-8b-and-18b: GPUs and their kind
    "eva01-clip-g-14": (256, "a100-40"),
    "eva01-clip-g-14-plus": (112, "a100-40"),
    "eva02-clip-b-16": (64, "a100-40"),
    "eva02-clip-l-14": (128, "a100-40"),
    "eva02-clip-l-14-336": (128, "a100-40"),
    "eva02-clip-e-14": (144, "a100-80"),
    "eva02-clip-e-14-plus": (144, "a100-80"),
    "eva-clip-8b": (384, "a100-40"),
    "eva-clip-8b-448": (384, "a100-40"),
    "eva-clip-18b": (360, "a100-40"),
    "eva-clip-18b-336": (360, "a100-40"),
}


@pytest.mark.parametrize("folder", PUBLISHED_ON)
def test_shipped_recipes_fit_the_cards_they_were_published_with(folder: str) -> None:
    name, (num_gpus, gpu) = f"{folder}/train-clip", PUBLISHED_ON[folder]
    planned = job_of_recipe(load_recipe(name).recipe, name, num_gpus)
    assert make_plan(planned, hardware(gpu)).refusal is None


def test_18b_in_one_pass_does_not_fit_and_is_told_what_would() -> None:
    name, whole = "eva-clip-18b/train-clip", ["train.micro_batch_size=108000"]
    refusal = make_plan(job_of_recipe(load_recipe(name, whole).recipe, name, 360), hardware("a100-40")).refusal
    assert refusal is not None
    settings = re.search(r"((?: ?--set \S+)+) needs", refusal.fix or "").group(1)
    changed = load_recipe(name, whole + [part for part in settings.split() if part != "--set"])
    assert make_plan(job_of_recipe(changed.recipe, name, 360), hardware("a100-40")).refusal is None


def test_failures_can_bind() -> None:
    rare, often = ASSUMED, replace(ASSUMED, gpu_hours_per_failure=40)
    run, gpu = job_of(RUNS["18B"]), hardware("a100-40")
    assert pace(run, gpu, rare, 0.35).binding == "compute"
    assert pace(run, gpu, often, 0.35).binding == "failures"
