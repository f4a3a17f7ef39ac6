"""Weights inside what training programs put around them: any prefix, any table, an average beside them."""

import logging

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from evatool.core.errors import CheckpointError
from evatool.distributed.world import World
from evatool.inference.loaded_clip import load_clip
from evatool.model.clip import build_clip
from evatool.model.presets import resolve_preset
from evatool.recipe.schema import EvalSection
from evatool.stages.evaluating.models import load_eval_model
from evatool.weights.key_mapping import canonical_state
from evatool.weights.wrappers import unwrapped, without_wrappers


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    return build_clip(resolve_preset("EVA02-CLIP-debug")).eval()


def below(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def inside(part, state):
    """Every block wrapped by a module of this name."""
    wrapped = {}
    for name, tensor in state.items():
        for block in ("blocks.0.", "blocks.1.", "resblocks.0."):
            name = name.replace(f".{block}", f".{block}{part}.")
        wrapped[name] = tensor
    return wrapped


WRAPPED = {
    "ddp": lambda w: below("module.", w),
    "compiled ddp": lambda w: below("module._orig_mod.", w),
    "ddp of compiled": lambda w: below("_orig_mod.module.", w),
    "some names": lambda w: {(f"module.{k}" if i % 2 else k): v for i, (k, v) in enumerate(w.items())},
    "one tower": lambda w: {k.replace("visual.", "visual.module."): v for k, v in w.items()},
    "compiled blocks": lambda w: inside("_orig_mod", w),
    "checkpointed blocks": lambda w: inside("_checkpoint_wrapped_module", w),
    "fsdp": lambda w: below("_fsdp_wrapped_module.", inside("_fsdp_wrapped_module", w)),
    "fsdp of checkpointed, compiled": lambda w: below(
        "_orig_mod._fsdp_wrapped_module.", inside("_fsdp_wrapped_module._checkpoint_wrapped_module", w)
    ),
    "lightning": lambda w: {"epoch": 1, "state_dict": below("model.", w), "hyper_parameters": {"lr": 0.1}},
    "lightning clip_model": lambda w: {"state_dict": below("clip_model.", w) | {"loss.weight": torch.ones(2)}},
    "lightning deepspeed": lambda w: {"state_dict": below("_forward_module.model.", w)},
    "a prefix of no list": lambda w: {"learner": {"student_net": below("backbone.", w)}},
    "average alone": lambda w: {"ema": w, "epoch": 1},
    "table net": lambda w: {"net": w},
    "deep tables": lambda w: {"checkpoint": {"weights": {"model": {"state_dict": below("module.net.", w)}}}},
    "averaged model": lambda w: {"n_averaged": torch.tensor(3)} | below("module.", w),
    "optimiser by name": lambda w: {
        "state_dict": w,
        "optimizer": {"state": {k: {"exp_avg": torch.zeros(2), "step": torch.tensor(1.0)} for k in w}},
    },
}


@pytest.mark.parametrize("how", WRAPPED)
def test_wrapped_weights_are_the_plain_ones(how, clip, tmp_path):
    state = clip.state_dict()
    torch.save(WRAPPED[how](state), tmp_path / "weights.pt")
    loaded = load_clip(tmp_path / "weights.pt")
    assert loaded.config.name == "EVA02-CLIP-debug"
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_wrapped_names_in_safetensors(clip, tmp_path):
    state = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    save_file(below("ema_model.module.", inside("_orig_mod", state)), tmp_path / "weights.safetensors")
    assert torch.equal(load_clip(tmp_path / "weights.safetensors").model.logit_scale, state["logit_scale"])


def test_the_average_beside_the_weights_is_taken_and_said(clip, tmp_path, caplog):
    raw = clip.state_dict()
    average = {name: tensor + 1 for name, tensor in raw.items()}
    for tables in (
        {"model": raw, "model_ema": average},
        {"state_dict": raw, "state_dict_ema": below("module.", average)},
    ):
        torch.save(tables, tmp_path / "both.pt")
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            assert torch.equal(load_clip(tmp_path / "both.pt").model.logit_scale, average["logit_scale"])
        assert "average is taken" in caplog.text
        assert "ema" in caplog.text
        for which, expected in (("raw", raw), ("ema", average)):
            caplog.clear()
            taken = load_clip(tmp_path / "both.pt", weights=which).model
            assert torch.equal(taken.logit_scale, expected["logit_scale"])
            assert not caplog.text


def test_an_evaluation_takes_the_weights_that_its_recipe_names(clip, tmp_path):
    raw = clip.state_dict()
    torch.save({"model": raw, "model_ema": {n: t + 1 for n, t in raw.items()}}, tmp_path / "both.pt")
    path, world = str(tmp_path / "both.pt"), World(0, 1, 0, torch.device("cpu"))
    prints = {}
    for which in ("raw", "ema"):
        section = EvalSection(models={"m": path}, model_weights={"m": which}, data=tmp_path)
        prints[which] = load_eval_model("m", path, section, world, tmp_path / "cache").record.fingerprint
        assert prints[which] == load_clip(path, weights=which).fingerprint
    assert prints["raw"] != prints["ema"]
    with pytest.raises(ValidationError, match="model_weights names x"):
        EvalSection(models={"m": path}, model_weights={"x": "raw"}, data=tmp_path)


def test_two_models_in_a_file_are_an_error_that_names_both(clip, tmp_path):
    state = clip.state_dict()
    other = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"student": below("module.", state), "teacher": other}, tmp_path / "two.pt")
    with pytest.raises(CheckpointError) as caught:
        load_clip(tmp_path / "two.pt")
    assert "'student.module.'" in str(caught.value)
    assert "'teacher.'" in str(caught.value)
    assert "weights = " in str(caught.value)
    assert torch.equal(load_clip(tmp_path / "two.pt", weights="teacher").model.logit_scale, other["logit_scale"])
    taken = load_clip(tmp_path / "two.pt", weights="student.module").model
    assert torch.equal(taken.logit_scale, state["logit_scale"])
    with pytest.raises(CheckpointError, match="has none such"):
        load_clip(tmp_path / "two.pt", weights="ema")


def test_names_that_come_together_are_refused():
    one = {"module.visual.trunk.cls_token": torch.zeros(1), "visual.trunk.cls_token": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"are both visual\.trunk\.cls_token"):
        unwrapped(one)


def test_plain_weights_pass_as_they_are(clip):
    state = clip.state_dict()
    assert unwrapped(state) is state
    assert set(canonical_state(below("any.thing.", state))) == set(state)
    assert without_wrappers("module.a._orig_mod.b._weight") == "a.b._weight"
