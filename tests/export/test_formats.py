"""Every format there and back, what may be chosen, and what is refused."""

import importlib.util
import json
import subprocess
import sys
from typing import get_args

import pytest
import torch
from golden import CLIP_FILES, read_golden, relative
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from evatool.core.errors import CheckpointError, DependencyError, EvatoolError, RecipeError, UsageError
from evatool.eval.results import EvalResults, ModelRecord, ResultRow, write_results
from evatool.export import graph, read_back, tensors
from evatool.export.baai import baai_config, baai_state
from evatool.export.folder import Target
from evatool.export.formats import EXPORTERS, build_exporter
from evatool.export.model_card import CardFacts
from evatool.export.tensors import export_baai, export_safetensors
from evatool.export.written import written_tensors
from evatool.inference.loaded_clip import load_clip
from evatool.model.clip import build_clip
from evatool.model.presets import resolve_preset
from evatool.recipe.schema import ExportRecipe, ExportSection
from evatool.recipe.schema.export import Format
from evatool.runs.run_dir import RunOptions
from evatool.stages.export import find_model, load_model, round_to, run
from evatool.stages.exporting import streamed as export_streamed
from evatool.weights.key_mapping import canonical_state

FACTS = CardFacts(name="test", source="test", architecture=[], parameters={"image": 1})
DEBUG = resolve_preset("EVA02-CLIP-debug")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file with weights that are not the initial ones, in float32."""
    torch.manual_seed(0)
    clip = build_clip(DEBUG)
    for parameter in clip.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("source") / "weights.safetensors"
    save_file({name: tensor.clone() for name, tensor in clip.state_dict().items()}, path)
    return path


def section(checkpoint, **options):
    return ExportSection.model_validate_json(json.dumps({"checkpoint": str(checkpoint)} | options))


def export(checkpoint, out, **options):
    """As the stage does, without a run folder."""
    asked = section(checkpoint, **options)
    clip = load_model(asked)
    round_to(clip, asked)
    return clip, export_model(clip, asked, FACTS, Target(out, asked.tolerance))


def export_model(clip, asked, facts, target):
    """By the exporter that the section names."""
    precision = {"precision": asked.arithmetic, "images": asked.agreement_images}
    return build_exporter(asked.format, tower=asked.tower, opset=asked.opset, **precision).export(clip, facts, target)


def needs_streaming(asked):
    return export_streamed.needs_streaming(find_model(asked), asked, build_exporter(asked.format))


def run_stage(out, checkpoint, **options):
    """The stage itself."""
    table = {"stage": "export", "export": {"checkpoint": str(checkpoint)} | options}
    return run(ExportRecipe.model_validate_json(json.dumps(table)), RunOptions(name="x", run_dir=out))


def assert_same_tensors(one, other):
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


# ------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parity
@pytest.mark.parametrize("name", CLIP_FILES)
def test_baai_to_ours_to_baai_is_bit_exact_rope_tables_included(name, tmp_path):
    golden = read_golden(name)
    torch.save(golden.state, tmp_path / "released.pt")
    clip = load_clip(tmp_path / "released.pt", model_config=golden.config)
    state = baai_state(written_tensors(clip), golden.config)
    export_baai(clip, state, baai_config(golden.config), FACTS, Target(tmp_path / "baai", 1e-5))
    assert_same_tensors(torch.load(tmp_path / "baai" / "model.pt", weights_only=True), golden.state)
    again = load_clip(tmp_path / "baai")
    assert again.fingerprint == clip.fingerprint
    assert again.config.vision == golden.config.vision
    written = baai_config(golden.config)["vision_cfg"]  # EVA-CLIP's loader asks for both
    assert written["eva_model_name"]
    assert written["drop_path_rate"] == 0


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("form", ["safetensors", "baai"])
def test_our_weights_there_and_back_in_each_dtype(weights, form, dtype, tmp_path):
    clip, done = export(weights, tmp_path / "first", format=form, dtype=dtype)
    assert done.difference <= 1e-6
    again = load_clip(tmp_path / "first")
    assert again.stored_dtype == clip.stored_dtype
    assert again.fingerprint == clip.fingerprint
    # written once more without a dtype: as at the source
    export(tmp_path / "first", tmp_path / "second", format=form)
    file = {"safetensors": "model.safetensors", "baai": "model.pt"}[form]
    assert (tmp_path / "first" / file).stat().st_size == (tmp_path / "second" / file).stat().st_size
    read = load_file if form == "safetensors" else lambda path: torch.load(path, weights_only=True)
    assert_same_tensors(read(tmp_path / "first" / file), read(tmp_path / "second" / file))


def test_temperature_is_not_rounded_where_the_dtype_cannot_hold_it(weights, tmp_path):
    clip, _ = export(weights, tmp_path / "half", format="safetensors", dtype="bf16")
    state = load_file(tmp_path / "half" / "model.safetensors")
    assert state["logit_scale"].dtype == torch.float32
    assert state["logit_scale"].shape == ()
    assert load_clip(tmp_path / "half").logit_scale == clip.logit_scale


@pytest.mark.parametrize("form", ["safetensors", "baai"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_one_tower(weights, form, tower, tmp_path):
    export(weights, tmp_path / "out", format=form, tower=tower)
    if form == "baai":
        names = set(torch.load(tmp_path / "out" / "model.pt", weights_only=True))
    else:
        names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert {name.split(".")[0] for name in names} == {"visual" if tower == "image" else "text"}


@pytest.mark.slow
def test_programs_of_both_towers(weights, tmp_path):
    _, done = export(weights, tmp_path / "out", format="torch-export")
    assert done.difference <= 1e-5
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "image.pt2", "text.pt2", "model_config.json", "README.md"
    }  # fmt: skip


def test_a_graph_takes_any_batch(weights, tmp_path):
    clip, _ = export(weights, tmp_path / "out", format="torch-export", tower="image")
    encode = torch.export.load(tmp_path / "out" / "image.pt2").module()
    images = torch.randn(7, 3, 32, 32)
    assert relative(encode(images), clip.encode_image(images)) < 1e-5


@pytest.mark.e2e
def test_timm_opens_the_image_tower(weights, tmp_path):
    clip, done = export(weights, tmp_path / "out", format="timm")
    assert done.difference <= 1e-5
    again = canonical_state(load_file(tmp_path / "out" / "model.safetensors"))
    assert torch.equal(again["visual.trunk.cls_token"], clip.model.visual.trunk.cls_token)


# ------------------------------------------------------------------------------------------------ resizing


@pytest.mark.e2e
def test_resized_saved_reopened_and_exported(weights, tmp_path):
    clip, _ = export(weights, tmp_path / "large", format="open_clip", image_size=64)
    assert clip.config.grid == (8, 8)
    again = load_clip(tmp_path / "large")
    assert again.config == clip.config
    assert again.fingerprint == clip.fingerprint
    export(tmp_path / "large", tmp_path / "baai", format="baai")
    assert load_clip(tmp_path / "baai").fingerprint == clip.fingerprint


def test_patch_size_as_eva_resized_it(weights, tmp_path):
    clip, _ = export(weights, tmp_path / "out", format="safetensors", image_size=32, patch_size=16)
    kernel = load_file(weights)["visual.trunk.patch_embed.proj.weight"]
    expected = torch.nn.functional.interpolate(kernel, size=(16, 16), mode="bicubic", align_corners=False)
    assert torch.equal(clip.model.visual.trunk.patch_embed.proj.weight, expected)
    assert load_clip(tmp_path / "out").config.grid == (2, 2)


def test_pseudo_inverse_is_another_choice(weights):
    bicubic = load_model(section(weights, patch_size=16))
    other = load_model(section(weights, patch_size=16, patch_resize="pseudo-inverse"))
    assert bicubic.fingerprint != other.fingerprint


def test_image_and_patch_size_together_need_not_fit_one_by_one(weights):
    assert load_model(section(weights, image_size=48, patch_size=12)).config.grid == (4, 4)


# ------------------------------------------------------------------------------------------------ the card


def results_file(path, fingerprint):
    row = ResultRow(
        model="m", fingerprint=fingerprint, set="s", variant="drawings/s", kind="classification", metric="top1",
        value=0.25, low=0.2, high=0.3, chance=0.01, n=100, num_classes=100, seed=0, seconds=1.0,
    )  # fmt: skip
    models = [ModelRecord(name="m", source="x", fingerprint=fingerprint, image_size=32, num_parameters=1)]
    results = EvalResults("drawings", "Drawings", "d", 0, 10, models=models, results=[row])
    write_results(path, results)
    return str(path)


def test_results_of_these_very_weights_are_on_the_card(weights, tmp_path):
    results = results_file(tmp_path / "results.json", load_clip(weights).fingerprint)
    run_stage(tmp_path / "out", weights, format="safetensors", results=results)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| drawings/s, top1, % (chance 1) | 25.0 [20.0, 30.0] |" in card
    assert "| parameters, total | 3,331,697 |" in card


def test_results_of_other_weights_are_refused(weights, tmp_path):
    results = results_file(tmp_path / "results.json", "other")
    with pytest.raises(UsageError, match="none of the 1 models"):
        run_stage(tmp_path / "out", weights, format="safetensors", results=results)
    assert not (tmp_path / "out" / "model.safetensors").exists()


# ------------------------------------------------------------------------------------------------ without loading


@pytest.mark.parametrize("form", ["safetensors", "baai", "open_clip"])
def test_streamed_exports_are_the_same_files(weights, form, tmp_path):
    streamed = run_stage(tmp_path / "streamed", weights, format=form, dtype="bf16", streamed=True)
    assert streamed.metrics["max_difference"] <= 1e-6
    file = {"safetensors": "model.safetensors", "baai": "model.pt", "open_clip": "open_clip_model.safetensors"}[form]
    export(weights, tmp_path / "whole", format="safetensors" if form == "open_clip" else form, dtype="bf16")
    whole = "model.safetensors" if form == "open_clip" else file
    assert (tmp_path / "streamed" / file).read_bytes() == (tmp_path / "whole" / whole).read_bytes()
    assert "every block of the image tower gave the same output" in (tmp_path / "streamed" / "README.md").read_text()


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("eva02-clip-b16", "eva-clip-18b") else pytest.param(name, marks=pytest.mark.slow)
        for name in CLIP_FILES
    ],
)
def test_released_files_are_converted_without_loading(name, tmp_path):
    golden = read_golden(name)
    torch.save(golden.state, tmp_path / "released.pt")
    (tmp_path / "model.json").write_text(json.dumps(golden.config.to_json()))
    options = {"model": str(tmp_path / "model.json"), "streamed": True}
    run_stage(tmp_path / "plain", tmp_path / "released.pt", format="safetensors", **options)
    run_stage(tmp_path / "back", tmp_path / "plain", format="baai", streamed=True)
    assert_same_tensors(torch.load(tmp_path / "back" / "model.pt", weights_only=True), golden.state)


def test_a_file_too_large_to_be_mapped_is_verified_by_our_reader(weights, tmp_path, monkeypatch):
    whole = read_back.safe_open

    def refuse(path, framework):
        if framework == "pt":
            raise RuntimeError(f"unable to mmap 36651060594 bytes from file <{path}>: Cannot allocate memory (12)")
        return whole(path, framework=framework)

    monkeypatch.setattr(read_back, "safe_open", refuse)
    done = run_stage(tmp_path / "out", weights, format="safetensors", dtype="bf16", streamed=True)
    assert done.metrics["max_difference"] <= 1e-6
    assert "evatool (the tensors: the file exceeds the memory)" in (tmp_path / "out" / "README.md").read_text()


def test_a_streamed_export_that_reads_back_otherwise_is_removed(weights, tmp_path, monkeypatch):
    class Damaged(read_back.LibraryMap):
        def __getitem__(self, name):
            return super().__getitem__(name) + (name == "text.ln_final.bias")

    monkeypatch.setattr(tensors, "LibraryMap", Damaged)
    with pytest.raises(EvatoolError, match=r"1 tensors of the export differ(.|\n)*text\.ln_final\.bias"):
        run_stage(tmp_path / "out", weights, format="safetensors", streamed=True)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_streaming_is_chosen_by_the_free_memory(weights, monkeypatch):
    asked = section(weights, format="safetensors")
    assert not needs_streaming(asked)
    monkeypatch.setattr(export_streamed, "available_memory", lambda: 10e6)
    assert needs_streaming(asked)
    graph_format = section(weights, format="torch-export")
    with pytest.raises(RecipeError, match="runs the whole model"):
        needs_streaming(graph_format)


def test_a_preset_has_no_weights_to_export():
    with pytest.raises(UsageError, match="there is no model at 'EVA02-CLIP-debug'"):
        find_model(section("EVA02-CLIP-debug"))


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"opset": 20}, "opset = 20 has no effect"),
        ({"patch_resize": "bicubic"}, "no effect without patch_size"),
        ({"tower": "image"}, "holds both towers"),
        ({"format": "timm", "tower": "text"}, "image towers only"),
        ({"quantize": "int8"}, "quantize = 'int8' has no effect"),
        ({"format": "onnx", "quantize": "int8", "dtype": "fp16"}, "two precisions"),
        ({"format": "onnx", "agreement_images": "folder"}, "agreement_images has no effect"),
    ],
)
def test_settings_without_effect_are_recipe_errors(options, problem):
    with pytest.raises(ValidationError, match=problem):
        section("x", **options)


def test_onnx_without_its_packages_names_the_install_line(weights, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(graph.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    with pytest.raises(DependencyError) as caught:
        export(weights, tmp_path / "out", format="onnx")
    assert "pip install 'evatool[onnx]'" in caught.value.fix
    assert not (tmp_path / "out").exists()


def test_a_sigmoid_models_bias_has_no_place_in_evas_format(weights, tmp_path):
    state = load_file(weights) | {"logit_bias": torch.tensor(-9.5)}
    save_file(state, tmp_path / "sigmoid.safetensors")
    with pytest.raises(RecipeError, match="no place for its logit_bias"):
        export(tmp_path / "sigmoid.safetensors", tmp_path / "out", format="baai")
    assert export(tmp_path / "sigmoid.safetensors", tmp_path / "tower", format="baai", tower="image")[1].files
    export(tmp_path / "sigmoid.safetensors", tmp_path / "ours", format="safetensors")
    assert load_clip(tmp_path / "ours").logit_bias == -9.5


@pytest.mark.parametrize("form", ["baai", "timm"])
def test_openais_image_tower_has_no_place_in_evas_formats(form, tmp_path):
    asked = section("x", format=form)
    config = {
        "embed_dim": 8,
        "vision_cfg": {
            "tower": "clip-vit",
            "image_size": 14,
            "patch_size": 7,
            "layers": 1,
            "width": 16,
            "head_width": 8,
        },
        "text_cfg": {"width": 8, "heads": 1, "layers": 1, "vocab_size": 30},
    }
    clip = load_clip("random", model_config=config)
    with pytest.raises(RecipeError, match="OpenAI's image tower"):
        export_model(clip, asked, FACTS, Target(tmp_path / "out", 1e-5))


def test_a_file_that_does_not_read_back_alike_is_removed(weights, tmp_path, monkeypatch):
    def damage(path, written, metadata):
        save_file({name: written[name] + (name == "text.ln_final.bias") for name in written}, path)

    monkeypatch.setattr(tensors, "write_safetensors", damage)
    clip = load_clip(weights)
    with pytest.raises(EvatoolError, match=r"tensors of the reloaded export differ: text\.ln_final\.bias"):
        export_safetensors(
            clip, written_tensors(clip), DEBUG.to_json(), FACTS, Target(tmp_path / "out", 1e-5), reopen=load_clip
        )
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_its_manifest_is_no_exported_folder(weights, tmp_path):
    export(weights, tmp_path / "out", format="safetensors")
    (tmp_path / "out" / "train_state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="MANIFEST"):
        load_clip(tmp_path / "out")


@pytest.mark.e2e
def test_the_command(weights, tmp_path):
    arguments = ["export", str(weights), "--to", "safetensors", "--out", str(tmp_path / "out"), "--json"]
    done = subprocess.run([sys.executable, "-m", "evatool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["max_difference"] == 0.0


def test_every_format_of_the_recipe_has_its_exporter():
    names = [exporter.format for exporter in EXPORTERS]
    assert {*names, "deepspeed"} == set(get_args(Format))
    for name, kind in zip(names, EXPORTERS, strict=True):
        assert type(build_exporter(name)) is kind
