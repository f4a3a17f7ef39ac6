"""Groups by tower, layer and decay, against the table of docs/reference/eva.md#parameter-groups written out by hand
for a toy EVA-02 CLIP.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from evatool.core.errors import RecipeError
from evatool.model.clip import build_clip
from evatool.model.mim import build_mim
from evatool.model.presets import resolve_preset
from evatool.optim.param_groups import build_param_groups, group_table
from evatool.recipe.schema import GroupSection, OptimSection

VISUAL = GroupSection(lr=4e-4, weight_decay=0.05, layer_decay=0.75)
TEXT = GroupSection(lr=4e-5, weight_decay=0.02, layer_decay=0.5)
OTHER = GroupSection(lr=5e-4, weight_decay=0.05)

BLOCK_DECAYED = [f"attn.{p}_proj.weight" for p in "qkv"] + ["attn.proj.weight"]
BLOCK_DECAYED += [f"mlp.{p}.weight" for p in ("fc1_g", "fc1_x", "fc2")]
BLOCK_NOT = [f"{n}.{p}" for n in ("norm1", "norm2", "attn.norm", "mlp.norm") for p in ("weight", "bias")]
BLOCK_NOT += [f"{n}.bias" for n in ("attn.q_proj", "attn.v_proj", "attn.proj", "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2")]
TEXT_DECAYED = ["attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"]
TEXT_NOT = [f"{n}.{p}" for n in ("ln_1", "ln_2") for p in ("weight", "bias")]
TEXT_NOT += ["attn.in_proj_bias", "attn.out_proj.bias", "mlp.c_fc.bias", "mlp.c_proj.bias"]


def in_block(prefix: str, block: int, names: list[str]) -> list[str]:
    return [f"{prefix}.{block}.{name}" for name in names]


# Two visual blocks, one text block: factors ld^(L + 1 - id) with L = 2 and L = 1.
CLIP_TABLE = {
    "visual/layer_00/decay": (4e-4, 0.421875, 0.05, ["visual.trunk.patch_embed.proj.weight"]),
    "visual/layer_00/no_decay": (
        4e-4,
        0.421875,
        0.0,
        ["visual.trunk.cls_token", "visual.trunk.pos_embed", "visual.trunk.patch_embed.proj.bias"],
    ),
    "visual/layer_01/decay": (4e-4, 0.5625, 0.05, in_block("visual.trunk.blocks", 0, BLOCK_DECAYED)),
    "visual/layer_01/no_decay": (4e-4, 0.5625, 0.0, in_block("visual.trunk.blocks", 0, BLOCK_NOT)),
    "visual/layer_02/decay": (4e-4, 0.75, 0.05, in_block("visual.trunk.blocks", 1, BLOCK_DECAYED)),
    "visual/layer_02/no_decay": (4e-4, 0.75, 0.0, in_block("visual.trunk.blocks", 1, BLOCK_NOT)),
    "visual/layer_03/decay": (4e-4, 1.0, 0.05, ["visual.trunk.head.weight"]),
    "visual/layer_03/no_decay": (
        4e-4,
        1.0,
        0.0,
        ["visual.trunk.norm.weight", "visual.trunk.norm.bias", "visual.trunk.head.bias"],
    ),
    "text/layer_00/decay": (4e-5, 0.25, 0.02, ["text.token_embedding.weight"]),
    "text/layer_00/no_decay": (4e-5, 0.25, 0.0, ["text.positional_embedding"]),
    "text/layer_01/decay": (4e-5, 0.5, 0.02, in_block("text.transformer.resblocks", 0, TEXT_DECAYED)),
    "text/layer_01/no_decay": (4e-5, 0.5, 0.0, in_block("text.transformer.resblocks", 0, TEXT_NOT)),
    "text/layer_02/decay": (4e-5, 1.0, 0.02, ["text.text_projection"]),
    "text/layer_02/no_decay": (4e-5, 1.0, 0.0, ["text.ln_final.weight", "text.ln_final.bias"]),
    "other/no_decay": (5e-4, 1.0, 0.0, ["logit_scale"]),
}


class Objective(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


@pytest.fixture(scope="module")
def clip() -> Objective:
    return Objective(build_clip(resolve_preset("EVA02-CLIP-debug")))


def groups_of(objective: nn.Module, section: OptimSection) -> list:
    return build_param_groups(objective.named_parameters(), section, depth_visual=2, depth_text=1)


def test_clip_groups_are_the_table(clip):
    groups = groups_of(clip, OptimSection(visual=VISUAL, text=TEXT, other=OTHER))
    assert [group.name for group in groups] == list(CLIP_TABLE)
    named = dict(clip.named_parameters())
    for group in groups:
        lr, lr_scale, weight_decay, names = CLIP_TABLE[group.name]
        assert (group.lr, group.weight_decay) == (lr, weight_decay), group.name
        assert group.lr_scale == pytest.approx(lr_scale, rel=1e-12), group.name
        assert sorted(group.param_names) == sorted(f"model.{name}" for name in names), group.name
        assert all(named[n] is p for n, p in zip(group.param_names, group.params, strict=True))
    assert sum(len(group.params) for group in groups) == len(named)


def test_without_layer_decay_a_tower_has_two_groups(clip):
    plain = GroupSection(lr=1e-3)
    groups = groups_of(clip, OptimSection(visual=plain, text=plain))
    names = ["visual/decay", "visual/no_decay", "text/decay", "text/no_decay", "other/no_decay"]
    assert [group.name for group in groups] == names
    assert {group.lr_scale for group in groups} == {1.0}
    assert groups[-1].lr == plain.lr, "other parameters follow the image tower where they have no section"


def test_mim_groups():
    mim = Objective(build_mim(resolve_preset("EVA02-CLIP-debug"), predict_dim=16))
    groups = {group.name: group for group in groups_of(mim, OptimSection(visual=VISUAL))}
    assert "model.mask_token" in groups["visual/layer_00/decay"].param_names
    assert groups["other/decay"].param_names == ["model.lm_head.weight"]
    assert groups["other/no_decay"].param_names == ["model.lm_head.bias"]
    assert (groups["other/decay"].lr, groups["other/decay"].lr_scale) == (4e-4, 1.0)
    assert not any(name.startswith("text") for name in groups)


def test_frozen_parameters_are_left_out(clip):
    clip.model.visual.requires_grad_(False)
    try:
        with pytest.raises(RecipeError, match=r"optim\.visual is set"):
            groups_of(clip, OptimSection(visual=VISUAL, text=TEXT))
        clip.model.visual.trunk.head.requires_grad_(True)
        groups = groups_of(clip, OptimSection(visual=VISUAL, text=TEXT))
        assert [g.name for g in groups if g.tower == "visual"] == ["visual/layer_03/decay", "visual/layer_03/no_decay"]
    finally:
        clip.model.visual.requires_grad_(True)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (OptimSection(visual=VISUAL), r"optim\.text is missing"),
        (OptimSection(visual=VISUAL, text=TEXT, other=VISUAL), r"optim\.other\.layer_decay has no effect"),
    ],
    ids=["text tower without section", "layer decay outside the towers"],
)
def test_sections_that_do_not_fit(clip, section, message):
    with pytest.raises(RecipeError, match=message):
        groups_of(clip, section)


def test_section_without_parameters(clip):
    with pytest.raises(RecipeError, match=r"optim\.text is set, but the model has no trainable parameter"):
        groups_of(Objective(clip.model.visual), OptimSection(visual=VISUAL, text=TEXT))


def test_block_beyond_the_depth():
    wrong = [("visual.blocks.2.weight", torch.zeros(2, 2))]
    wrong[0][1].requires_grad_()
    with pytest.raises(RecipeError, match="is in block 2"):
        build_param_groups(wrong, OptimSection(visual=VISUAL), depth_visual=2, depth_text=0)


def test_table_for_people(clip):
    rows = group_table(groups_of(clip, OptimSection(visual=VISUAL, text=TEXT, other=OTHER)))
    assert len(rows) == 1 + len(CLIP_TABLE)
    assert rows[1] == ["visual/layer_00/decay", "0.0004", "0.4219", "0.05", "1", "12,288"]
    assert {len(row) for row in rows} == {len(rows[0])}
