"""Exact parameter counts (docs/reference/eva.md#parameter-counts), on the meta device."""

from pathlib import Path

import open_clip
import pytest
import torch

from evatool.model.clip import build_clip
from evatool.model.mim import build_mim
from evatool.model.presets import PRESETS, resolve_preset

CLIP = {
    "EVA01-CLIP-g-14": (1_012_588_928, 123_846_912, 1_136_435_841),
    "EVA01-CLIP-g-14-plus": (1_012_588_928, 354_032_640, 1_366_621_569),
    "EVA02-CLIP-B-16": (86_263_040, 63_428_096, 149_691_137),
    "EVA02-CLIP-L-14": (304_105_152, 123_650_304, 427_755_457),
    "EVA02-CLIP-L-14-336": (304_432_832, 123_650_304, 428_083_137),
    "EVA02-CLIP-bigE-14": (4_350_556_928, 354_032_640, 4_704_589_569),
    "EVA02-CLIP-bigE-14-plus": (4_350_556_928, 694_332_160, 5_044_889_089),
    "EVA-CLIP-8B": (7_526_088_704, 694_659_840, 8_220_748_545),
    "EVA-CLIP-8B-448": (7_529_234_432, 694_659_840, 8_223_894_273),
    "EVA-CLIP-18B": (17_630_494_720, 694_987_520, 18_325_482_241),
    # The paper's 336 model has no released count: 18B and 320 more positions of width 5120.
    "EVA-CLIP-18B-336": (17_630_494_720 + 320 * 5120, 694_987_520, 18_325_482_241 + 320 * 5120),
}
MIM = {  # with mask token and prediction head, and without
    "EVA-01-g": (1_012_229_632, None),
    "EVA-L": (316_576_768, None),
    "EVA-02-Ti": (5_699_968, 5_502_144),
    "EVA-02-S": (22_015_744, 21_621_120),
    "EVA-02-B": (86_546_944, 85_758_720),
    "EVA-02-L": (304_319_424, 303_268_800),
    # No count was published: the CLIP tower less its projection, and mask token and head for a 1024-d teacher.
    "EVA-02-E": (4_350_556_928 - (1792 + 1) * 1024 + 1792 + (1792 + 1) * 1024, None),
    "EVA-8B": (7_526_088_704 - 4096 * 1280 + 4096 + (4096 + 1) * 1024, None),
    "EVA-18B": (17_630_494_720 - 5120 * 1536 + 5120 + (5120 + 1) * 1024, None),
}

TEACHERS = {  # our name -> open_clip's
    "OpenAI-CLIP-B-16": "ViT-B-16-quickgelu",
    "OpenAI-CLIP-L-14": "ViT-L-14-quickgelu",
    "OpenAI-CLIP-L-14-336": "ViT-L-14-336-quickgelu",
    "OpenCLIP-B-16": "ViT-B-16",
    "OpenCLIP-L-14": "ViT-L-14",
    "OpenCLIP-H-14": "ViT-H-14",
    "OpenCLIP-bigG-14": "ViT-bigG-14",
}


# Models that differ from another in their image size only, or are wider MIM trunks of the same kind: seconds each.
LARGE = ("EVA02-CLIP-L-14-336", "EVA02-CLIP-bigE-14", "EVA-CLIP-8B-448", "EVA-CLIP-18B-336", "EVA-02-E", "EVA-8B")


def cells(names):
    return [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in names]


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_every_released_preset_is_counted():
    ours = {name for name in PRESETS if "toy" in name or "debug" in name}
    assert set(CLIP) | set(MIM) | set(TEACHERS) == set(PRESETS) - ours


@pytest.mark.parametrize("name", cells(CLIP))
def test_clip(name):
    with torch.device("meta"):
        clip = build_clip(resolve_preset(name))
    assert (count(clip.visual), count(clip.text), count(clip)) == CLIP[name]


@pytest.mark.parametrize("name", cells(MIM))
def test_mim(name):
    config = resolve_preset(name)
    with torch.device("meta"):
        model = build_mim(config, predict_dim=config.predict_dim)
    total, trunk = MIM[name]
    assert count(model) == total
    if trunk is not None:
        assert count(model.visual) == trunk


@pytest.mark.parametrize("name", [*CLIP, *MIM])
def test_the_page_of_models_has_the_counts(name):
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
    total = CLIP[name][2] if name in CLIP else MIM[name][0]
    assert row.rstrip(" |").endswith(f"{total:,}")


@pytest.mark.parametrize("name", TEACHERS)
def test_teachers_are_open_clips_own_models(name):
    theirs = open_clip.get_model_config(TEACHERS[name])
    with torch.device("meta"):
        ours = build_clip(resolve_preset(name))
        expected = open_clip.create_model(TEACHERS[name], device="meta", force_custom_text=True)

    def shapes(model):
        return {key: tuple(t.shape) for key, t in model.state_dict().items() if key != "logit_scale"}

    assert shapes(ours) == shapes(expected)
    assert resolve_preset(name).quick_gelu == theirs.get("quick_gelu", False)
    assert resolve_preset(name).num_heads == theirs["vision_cfg"]["width"] // theirs["vision_cfg"].get("head_width", 64)
    assert resolve_preset(TEACHERS[name]).name == name
