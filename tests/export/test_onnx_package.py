"""An ONNX export served alone: its script, token ids, scores and precision, and `load_clip` on the folder."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evatool
from evatool.core.errors import CheckpointError, UsageError
from evatool.distributed.world import World
from evatool.export.folder import Target
from evatool.export.graph import OnnxExporter
from evatool.export.model_card import CardFacts
from evatool.export.onnx_package import ODD_CAPTIONS
from evatool.export.onnx_precision import agreement, reduce_precision
from evatool.inference.loaded_clip import load_clip
from evatool.inference.onnx_package import OnnxTower
from evatool.model.clip import build_clip
from evatool.model.presets import resolve_preset
from evatool.recipe.schema import EvalSection
from evatool.stages.evaluating.models import load_eval_model

FACTS = CardFacts(name="test", source="test", architecture=[], parameters={"image": 1})


def write_picture(path: Path, seed: int, size: tuple[int, int] = (50, 41)) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 5 + 1, size[0] // 5 + 1, 3), np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A sigmoid model with weights far from the initial ones."""
    torch.manual_seed(0)
    model = build_clip(resolve_preset("EVA02-CLIP-debug").with_logit_bias(True))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-1.5)
    path = tmp_path_factory.mktemp("source") / "sigmoid.pt"
    torch.save(model.state_dict(), path)
    return load_clip(path)


@pytest.fixture(scope="module")
def package(clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("package") / "onnx"
    exported = OnnxExporter().export(clip, FACTS, Target(folder, 1e-5))
    assert exported.difference <= 1e-5
    return folder


@pytest.fixture(scope="module")
def script(package):
    """The classes of the package's own script, in this process."""
    return runpy.run_path(str(package / "classify.py"))["Package"](package)


def test_the_files_and_the_name_of_the_free_axis(package):
    import onnx

    assert {path.name for path in package.iterdir()} == {
        *("image.onnx", "text.onnx", "preprocessor.json", "tokenizer.json", "scores.json", "classify.py", "ftfy.zip"),
        *("model_config.json", "README.md"),
    }
    for name in ("image.onnx", "text.onnx"):
        graph = onnx.load(package / name)
        onnx.checker.check_model(graph, full_check=True)
        for value in (graph.graph.input[0], graph.graph.output[0]):
            assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_token_ids_of_odd_captions_are_the_models_own(script, clip):
    captions = [*ODD_CAPTIONS, "Ã¢â‚¬â„¢ twice", "<b>&eacute;</b>", "naïve café", "l’été", "a\u2028b", "ﬀ ﬃ", "１２３"]
    assert np.array_equal(script.tokens(captions), clip.tokenizer(captions).numpy())


@pytest.mark.parametrize("size", [(50, 41), (41, 50), (32, 32), (33, 200)], ids=str)
def test_pixels_are_those_of_the_model(script, clip, tmp_path, size):
    with Image.open(write_picture(tmp_path / "p.png", 1, size)) as picture:
        difference = np.abs(script.pixels(picture) - clip.preprocess(picture).numpy())
    assert difference.max() < 1e-5


# Where anything but the four packages and what they need is asked for, the process ends.
ALONE = """
import sys, runpy
for name in ("torch", "evatool", "open_clip", "timm", "transformers", "torchvision", "regex"):
    sys.modules[name] = None
sys.path = [entry for entry in sys.path if entry]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
assert sys.modules["ftfy"].__file__.startswith(sys.argv[0].replace("classify.py", "ftfy.zip"))
"""


def test_the_script_classifies_without_evatool(package, clip, tmp_path):
    picture = write_picture(tmp_path / "p.png", 2)
    labels = ["a cat", "Caf&eacute;", "smile 😀"]
    arguments = [
        str(package / "classify.py"),
        str(picture),
        "--labels",
        *labels,
        "--templates",
        "{}",
        "a {}.",
        "--json",
    ]
    done = subprocess.run([sys.executable, "-c", ALONE, *arguments], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)[str(picture)]
    texts = []
    for label in labels:
        both = clip.encode_text(clip.tokenizer([label, f"a {label}."]), normalize=True)
        texts.append(both.mean(dim=0))
    with Image.open(picture) as image:
        features = clip.encode_image(clip.preprocess(image)[None])
    expected = clip.probabilities(features, torch.stack(texts))[0]
    assert [found[label] for label in labels] == pytest.approx(expected.tolist(), abs=1e-5)
    assert expected.sum() != pytest.approx(1), "each pair has a probability of its own"


def test_load_clip_runs_the_package(package, clip, tmp_path):
    loaded = evatool.load_clip(package)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    tokens = clip.tokenizer(["a cat", "a very long caption of many words " * 5])
    torch.testing.assert_close(loaded.encode_image(images), clip.encode_image(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loaded.encode_text(tokens), clip.encode_text(tokens), rtol=1e-4, atol=1e-5)
    assert (loaded.logit_scale, loaded.logit_bias) == (pytest.approx(clip.logit_scale), -1.5)
    assert loaded.fingerprint == evatool.load_clip(package).fingerprint != clip.fingerprint
    with pytest.raises(UsageError, match="precision cannot be chosen"):
        evatool.load_clip(package, precision="fp16")
    with pytest.raises(UsageError, match="no patch tokens"):
        loaded.visual_tokens(images)


def test_an_evaluation_runs_the_package(package, clip):
    section = EvalSection(models={"m": str(package)}, data=Path("x"), shard_model="never")
    model = load_eval_model("m", str(package), section, World(0, 1, 0, torch.device("cpu")), None)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(model.encode_image(images), clip.encode_image(images), rtol=1e-4, atol=1e-5)
    tokens = model.tokenizer(["a cat", "dogs"])
    torch.testing.assert_close(model.encode_text(tokens), clip.encode_text(tokens), rtol=1e-4, atol=1e-5)
    assert not model.trims_text
    assert model.patch_tokens is None


def test_a_damaged_package_is_named(package, tmp_path):
    shutil.copytree(package, tmp_path / "copy")
    (tmp_path / "copy" / "text.onnx").write_bytes(b"not a graph")
    with pytest.raises(CheckpointError, match="onnxruntime cannot open"):
        evatool.load_clip(tmp_path / "copy")


def test_onnxruntimes_own_quantisation_takes_the_graph_as_it_is(package, clip, tmp_path):
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(package / "image.onnx", tmp_path / "q.onnx", weight_type=QuantType.QUInt8)
    session = onnxruntime.InferenceSession(tmp_path / "q.onnx", providers=["CPUExecutionProvider"])
    images = torch.randn(4, 3, 32, 32)
    theirs = torch.from_numpy(session.run(["features"], {"input": images.numpy()})[0])
    assert torch.nn.functional.cosine_similarity(theirs, clip.encode_image(images)).min() > 0.99


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(5):
        write_picture(folder / f"{seed}.png", seed)
    return folder


@pytest.mark.parametrize(("precision", "least", "share"), [("int8", 0.99, 0.3), ("fp16", 0.99999, 0.55)])
def test_graphs_in_fewer_bits_stay_near_the_model_on_given_images(
    package, clip, pictures, tmp_path, precision, least, share
):
    for tower in ("image", "text"):
        shutil.copy(package / f"{tower}.onnx", tmp_path)
        reduce_precision(tmp_path / f"{tower}.onnx", precision)
    # The image graph of a toy is mostly its nodes: sizes are told by the other one.
    assert (tmp_path / "text.onnx").stat().st_size < share * (package / "text.onnx").stat().st_size
    found = agreement(tmp_path, clip, ["image", "text"], pictures)
    assert found["images"] == 5
    for tower in ("image", "text"):
        assert least < found[tower]["cosine_min"] <= found[tower]["cosine_mean"] <= 1.00001
        assert found[tower]["cosine_min"] < 0.9999999, "features do change"
    session = OnnxTower(tmp_path / "image.onnx")
    with Image.open(pictures / "0.png") as picture:
        image = clip.preprocess(picture)[None]
    cosine = torch.nn.functional.cosine_similarity(session(image), clip.encode_image(image))
    assert float(cosine) >= found["image"]["cosine_min"] - 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_an_export_in_fewer_bits_reports_what_it_loses(clip, pictures, tmp_path, precision):
    done = OnnxExporter(precision=precision, images=pictures).export(clip, FACTS, Target(tmp_path / "out", 1e-5))
    assert json.loads((tmp_path / "out" / "agreement.json").read_text()) == done.agreement
    assert f"{done.agreement['image']['cosine_min']:.4f} at least" in (tmp_path / "out" / "README.md").read_text()
    assert evatool.load_clip(tmp_path / "out").encode_image(torch.zeros(1, 3, 32, 32)).shape == (1, 32)


def test_a_folder_without_pictures_is_refused(clip, package, tmp_path):
    with pytest.raises(UsageError, match="holds no picture"):
        agreement(package, clip, ["image"], tmp_path)
