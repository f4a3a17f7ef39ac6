"""Names and configurations."""

import json
import subprocess
import sys

import pytest

from evatool.core.errors import RecipeError
from evatool.model.config import ModelConfig, from_mim_arguments, mim_config
from evatool.model.presets import PRESETS, resolve_preset


def test_presets_need_no_torch():
    code = (
        "import sys, evatool.model.presets as p; p.resolve_preset('EVA02-CLIP-L-14'); assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", PRESETS)
def test_json_reads_back_equal(name):
    config = PRESETS[name]
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("spelling", "preset"),
    [
        ("EVA02-CLIP-L-14", "EVA02-CLIP-L-14"),
        ("EVA02_CLIP_L_psz14", "EVA02-CLIP-L-14"),
        ("eva02-l-14", "EVA02-CLIP-L-14"),
        ("EVA-02-CLIP-L/14", "EVA02-CLIP-L-14"),
        ("EVA02-CLIP-L-14-336px", "EVA02-CLIP-L-14-336"),
        ("EVA01-g-14", "EVA01-CLIP-g-14"),
        ("EVA01-CLIP-g-14-plus", "EVA01-CLIP-g-14-plus"),
        ("EVA02-E-14-plus", "EVA02-CLIP-bigE-14-plus"),
        ("EVA02-CLIP-E/14+", "EVA02-CLIP-bigE-14-plus"),
        ("EVA-CLIP-8B-plus", "EVA-CLIP-8B-448"),
        ("eva_clip_18b", "EVA-CLIP-18B"),
        ("EVA-02-L", "EVA-02-L"),
        ("eva02_Ti", "EVA-02-Ti"),
        ("EVA-01-g", "EVA-01-g"),
    ],
)
def test_names_are_forgiving(spelling, preset):
    assert resolve_preset(spelling).name == preset


@pytest.mark.parametrize(
    ("typo", "suggestion"), [("EVA02-CLIP-L-15", "EVA02-CLIP-L-14"), ("EVA-CLIP-80B", "EVA-CLIP-8B")]
)
def test_near_misses_suggest_the_nearest(typo, suggestion):
    with pytest.raises(RecipeError) as caught:
        resolve_preset(typo)
    assert suggestion in (caught.value.fix or "")


def test_a_name_that_resembles_nothing_lists_what_there_is():
    with pytest.raises(RecipeError) as caught:
        resolve_preset("resnet")
    assert "EVA02-CLIP-B-16" in (caught.value.expected or "")


def test_baai_json_with_kernel_settings_is_read():
    table = {
        "embed_dim": 1024,
        "vision_cfg": {
            "image_size": 224,
            "layers": 40,
            "width": 1408,
            "head_width": 88,
            "mlp_ratio": 4.3637,
            "patch_size": 14,
            "eva_model_name": "eva-clip-g-14-x",
            "drop_path_rate": 0,
            "xattn": True,
            "fusedLN": True,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 1024,
            "heads": 16,
            "layers": 24,
            "xattn": False,
            "fusedLN": True,
        },
    }
    config = ModelConfig.from_json(table, name="EVA01-CLIP-g-14-plus")
    assert config == PRESETS["EVA01-CLIP-g-14-plus"]


def test_every_problem_of_a_configuration_is_named():
    table = {"vision_cfg": {"with": 3, "global_average_pool": True}, "text_cfg": {"hieght": 1}, "embed": 4}
    with pytest.raises(RecipeError) as caught:
        ModelConfig.from_json(table)
    text = str(caught.value)
    for part in ("vision_cfg.with is unknown; did you mean 'width'", "global_average_pool", "hieght", "'embed'"):
        assert part in text
    assert "embed_dim is missing" in text


def test_image_size_must_be_whole_patches():
    with pytest.raises(RecipeError, match=r"no multiple.*nearest that are: 224, 238"):
        resolve_preset("EVA02-CLIP-L-14").with_image_size(230)


def test_integer_rope_positions_only_on_their_grid():
    with pytest.raises(RecipeError, match="set intp_freq"):
        ModelConfig.from_json({"vision_cfg": {"rope": True, "pt_hw_seq_len": 16, "image_size": 224, "patch_size": 16}})


def test_another_image_size_keeps_everything_else():
    config = resolve_preset("EVA02-CLIP-L-14").with_image_size(336)
    assert config.vision == PRESETS["EVA02-CLIP-L-14-336"].vision
    assert config.grid == (24, 24)


def test_mim_form_of_an_eva02_clip_has_no_norm_inside_attention():
    config = mim_config(PRESETS["EVA02-CLIP-L-14"], predict_dim=1024)
    assert (config.task, config.text, config.predict_dim) == ("mim", None, 1024)
    assert config.vision["inner_attn_ln"] is False
    assert config.vision["subln"] is True
    assert config.vision["init"] == "eva-02"
    assert mim_config(PRESETS["EVA01-CLIP-g-14"]).vision["init"] == "eva-01"


def test_mim_constructor_arguments():
    config = from_mim_arguments(
        {"img_size": 224, "patch_size": 14, "embed_dim": 192, "depth": 12, "num_heads": 3, "predict_feature_dim": 1024,
         "mlp_ratio": 8 / 3, "swiglu": True, "rope": True, "xavier_normal_init": True},
        name="EVA-02-Ti",
    )  # fmt: skip
    # the preset rescales positions to other grids; on the training grid that is the same
    ours = PRESETS["EVA-02-Ti"]
    assert config.vision | {"mlp_ratio": 1, "intp_freq": True} == ours.vision | {"mlp_ratio": 1}
    assert config.predict_dim == ours.predict_dim
