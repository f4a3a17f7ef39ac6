"""Exported open_clip folders: whole, verified, tied to their path with a fix, or not there at all."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden import read_golden, relative
from PIL import Image
from safetensors.torch import load_file, save_file

import evatool
from evatool.core.errors import EvatoolError, UsageError
from evatool.export import open_clip as target
from evatool.export.folder import Target
from evatool.export.model_card import CardFacts
from evatool.export.open_clip import export_open_clip, open_clip_description
from evatool.export.verify import fixed_inputs, largest_difference
from evatool.export.written import written_tensors
from evatool.inference.loaded_clip import LoadedClip, load_clip
from evatool.recipe.schema import ExportRecipe
from evatool.runs.run_dir import RunOptions
from evatool.stages.export import run as run_export


def export(clip, out):
    description, target = open_clip_description(clip.config), Target(out, tolerance=1e-5)
    return export_open_clip(clip, description, written_tensors(clip), FACTS, target)


FACTS = CardFacts(name="test", source="test", architecture=[], parameters={"image": 1})


@pytest.fixture(scope="module")
def clip() -> LoadedClip:
    torch.manual_seed(0)
    return load_clip("EVA02-CLIP-debug")


@pytest.fixture(scope="module")
def exported(clip, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "a folder"
    done = export(clip, out)
    assert done.difference <= 1e-5
    return out


# Opening open_clip takes a process about ten seconds, so one process answers for all that must hold afterwards.
READER = """
import sys
sys.modules["evatool"] = None
from safetensors.torch import load_file, save_file
given = load_file(sys.argv[1])
{card}
assert tokenizer(["a cat"]).shape == (1, 16)
out = {{"image": model.eval().encode_image(given["image"]), "text": model.encode_text(given["tokens"])}}
try:
    open_clip.create_model_from_pretrained("local-dir:" + sys.argv[3])
    raise SystemExit("a moved folder opened without the fix")
except FileNotFoundError:
    pass
moved = open_clip.create_model_from_pretrained("local-dir:" + sys.argv[4])[0].eval()
out["moved"] = moved.encode_image(given["image"])
save_file({{name: tensor.detach().contiguous() for name, tensor in out.items()}}, sys.argv[2])
"""


@pytest.fixture(scope="module")
def reopened(exported, clip, tmp_path_factory):
    """What a fresh process without evatool makes of the folder by its card's three lines, and of moved copies."""
    work = tmp_path_factory.mktemp("reopened")
    inputs = fixed_inputs(clip.image_size, clip.context_length, clip.config.text["vocab_size"])
    save_file(inputs, work / "in")
    card = (exported / "README.md").read_text()
    code = re.search(r"```python\n(.+?)\n```", card, re.DOTALL).group(1)
    assert len(code.splitlines()) == 3
    assert "tied to its path" in card
    fix = re.search(r"```sh\n(.+)\n```", card).group(1)
    for name in ("moved", "mended"):
        shutil.copytree(exported, work / name)
    subprocess.run(fix.replace("python", sys.executable, 1), shell=True, cwd=work / "mended", check=True)
    # the unmended copy must not find the original
    unmended = work / "moved" / "open_clip_config.json"
    unmended.write_text(unmended.read_text().replace(str(exported), str(work / "where it was made")))
    arguments = [str(work / name) for name in ("in", "out", "moved", "mended")]
    subprocess.run([sys.executable, "-c", READER.format(card=code), *arguments], check=True)
    return inputs, load_file(work / "out")


def test_the_cards_three_lines_give_our_features_at_the_final_path(reopened, exported, clip):
    inputs, theirs = reopened
    assert relative(theirs["image"], clip.encode_image(inputs["image"])) <= 1e-5
    assert relative(theirs["text"], clip.encode_text(inputs["tokens"])) <= 1e-5
    assert sorted(path.name for path in exported.iterdir()) == sorted(
        ["open_clip_config.json", "open_clip_model.safetensors", "config.json", "README.md"]
    )


def test_a_moved_folder_works_after_the_line_in_its_card_and_not_before(reopened, clip):
    inputs, theirs = reopened
    assert relative(theirs["moved"], clip.encode_image(inputs["image"])) <= 1e-5


def test_our_own_reader_gives_back_the_same_model(exported, clip):
    again = load_clip(exported)
    assert again.config == clip.config
    assert again.fingerprint == clip.fingerprint


def test_a_difference_beyond_the_tolerance_leaves_nothing(clip, tmp_path, monkeypatch):
    def wrong(reader, folder, inputs, *, needs_evatool):
        return {
            "image_features": clip.encode_image(inputs["image"]),
            "text_features": clip.encode_text(inputs["tokens"]) * 1.001,
            "logit_scale": clip.model.logit_scale.exp(),
            "preprocessed": clip.preprocess(Image.fromarray(inputs["picture"].numpy())),
        }

    monkeypatch.setattr(target, "foreign_outputs", wrong)
    with pytest.raises(EvatoolError, match=r"text_features 1\.00e-03"):
        export(clip, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.e2e
def test_an_export_that_cannot_be_opened_leaves_nothing(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(target, "write_safetensors", lambda path, *_: path.write_bytes(b"not weights"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("stays")
    with pytest.raises(EvatoolError, match="could not open"):
        export(clip, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_full_disk_leaves_nothing(clip, tmp_path, monkeypatch):
    def full(path, *_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(target, "write_safetensors", full)
    with pytest.raises(EvatoolError, match="the disk is full"):
        export(clip, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_used_folder_is_refused(exported, clip):
    before = {path.name: path.stat().st_mtime_ns for path in exported.iterdir()}
    with pytest.raises(UsageError, match="already holds an export"):
        export(clip, exported)
    assert {path.name: path.stat().st_mtime_ns for path in exported.iterdir()} == before


@pytest.mark.parametrize("bad", [float("nan"), 1.0], ids=["nan", "shape"])
def test_no_number_and_another_shape_are_differences(bad, tmp_path):
    theirs = {"f": torch.full((2,), bad) if bad != bad else torch.ones(3)}
    with pytest.raises(EvatoolError, match="differs"):
        largest_difference(theirs, {"f": torch.ones(2)}, Target(tmp_path, tolerance=1e-5))


# ------------------------------------------------------------------------------------------------ other towers


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("eva02-clip-b16", marks=pytest.mark.e2e),
        pytest.param("eva-clip-18b", marks=pytest.mark.slow),
        pytest.param("eva-clip-8b", marks=pytest.mark.slow),
        pytest.param("eva01-clip-g", marks=pytest.mark.slow),
        pytest.param("eva02-clip-bige14", marks=pytest.mark.slow),
    ],
)
def test_tiny_towers_of_the_other_families_with_a_sigmoid_models_bias(name, tmp_path):
    golden = read_golden(name)
    torch.save(golden.state | {"logit_bias": torch.tensor(-9.5)}, tmp_path / "weights.pt")
    clip = load_clip(tmp_path / "weights.pt", model_config=golden.config)
    done = export(clip, tmp_path / "out")
    assert done.difference <= 1e-5
    again = load_clip(tmp_path / "out")
    assert relative(again.encode_image(golden.inputs["image"]), golden.expected["image_features"]) <= 1e-5
    # open_clip had the bias too: it is among the outputs that were compared
    assert again.logit_bias == clip.logit_bias == -9.5
    assert json.loads((tmp_path / "out" / "open_clip_config.json").read_text())["model_cfg"]["init_logit_bias"] < 0


@pytest.mark.parametrize(
    ("preset", "tied", "needs_evatool"),
    [("EVA02-CLIP-B-16", False, False), ("EVA-CLIP-18B", False, True), ("EVA02-CLIP-toy", True, False)],
)
def test_who_needs_what(preset, tied, needs_evatool):
    config = evatool.model.presets.resolve_preset(preset)
    description = open_clip_description(config)
    assert (description.timm_config is not None, description.needs_evatool) == (tied, needs_evatool)


# ------------------------------------------------------------------------------------------------ the stage


@pytest.mark.e2e
def test_stage_writes_into_its_run_folder(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a relative run folder, as on the command line: the verifying process is elsewhere
    recipe = ExportRecipe.model_validate_json(json.dumps({"stage": "export", "export": {"checkpoint": str(exported)}}))
    result = run_export(recipe, RunOptions(name="x", run_dir=Path("run")))
    assert result.outputs["model"] == Path("run")
    assert result.metrics["max_difference"] <= 1e-5
    assert result.metrics["parameters"] == 3_331_697
    assert load_clip(tmp_path / "run").fingerprint == load_clip(exported).fingerprint
