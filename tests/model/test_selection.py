"""First weights cut out of a larger model: each where it should be, and the whole of it where the shapes are equal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from evatool.core.errors import CheckpointError
from evatool.model.clip import build_clip
from evatool.model.config import ModelConfig
from evatool.model.presets import resolve_preset
from evatool.model.registration import register
from evatool.recipe import schema
from evatool.stages.training.initial_weights import init_clip
from evatool.weights.load import load_clip_weights
from evatool.weights.select import chosen, select_weights

FAMILIES = [
    "EVA02-CLIP-debug",
    "EVA01-CLIP-debug",
    "EVA02-CLIP-bigE-debug",
    "EVA-CLIP-8B-debug",
    "EVA-CLIP-18B-debug",
]


def resized(config: ModelConfig, name: str, *, text: dict[str, int], embed_dim: int, **vision: int) -> ModelConfig:
    table = config.to_json()
    table |= {"name": name, "embed_dim": embed_dim}
    table["vision_cfg"] |= vision
    table["text_cfg"] |= {"vocab_size": 64, **text}
    return ModelConfig.from_json(table)


def large(family: str) -> ModelConfig:
    """Six layers, four heads and 128 channels on both sides."""
    text = {"width": 128, "heads": 4, "layers": 6, "context_length": 20}
    return resized(resolve_preset(family), "large", text=text, embed_dim=48, layers=6, width=128, head_width=32)


def small(family: str) -> ModelConfig:
    """Three layers and two heads; the text tower keeps its width."""
    text = {"width": 128, "heads": 4, "layers": 2, "context_length": 16}
    return resized(resolve_preset(family), "small", text=text, embed_dim=24, layers=3, width=64, head_width=32)


def weights_of(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    register()
    torch.manual_seed(seed)
    clip = build_clip(config)
    # also what starts at 0 or 1 tells its channels apart
    return {name: torch.randn_like(p) for name, p in clip.named_parameters()}


@pytest.mark.parametrize(
    ("count", "out_of", "rule", "expected"),
    [
        (3, 6, "even", [0, 2, 4]),
        (4, 4, "even", [0, 1, 2, 3]),
        (1, 5, "even", [0]),
        (12, 32, "even", [0, 3, 6, 8, 11, 14, 17, 20, 23, 25, 28, 31]),
        (3, 6, "first", [0, 1, 2]),
    ],
)
def test_the_rule(count: int, out_of: int, rule: str, expected: list[int]) -> None:
    assert chosen(count, out_of, rule) == expected


def test_no_channel_is_taken_twice() -> None:
    for out_of in (97, 128, 1280, 1792):
        for count in range(1, out_of + 1, 7):
            found = chosen(count, out_of, "even")
            assert len(set(found)) == count
            assert found == sorted(found)
            assert 0 <= found[0] <= found[-1] < out_of


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", ["even", "first"])
def test_an_equal_model_is_the_source_itself(family: str, rule: str) -> None:
    config = large(family)
    state = weights_of(config)
    found = select_weights(state, config, config, layers=rule, channels=rule)
    assert set(found) == set(state)
    assert all(torch.equal(found[name], value) for name, value in state.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", ["even", "first"])
def test_every_parameter_of_a_smaller_model_is_filled(family: str, rule: str) -> None:
    state, target = weights_of(large(family)), small(family)
    found = select_weights(state, large(family), target, layers=rule, channels=rule)
    clip = build_clip(target)
    report = load_clip_weights(clip, found)
    assert report.fresh == report.unused == report.resized == []
    for name, value in clip.named_parameters():
        assert torch.equal(value, found[name]), name


def test_each_weight_is_the_one_at_its_place() -> None:
    """Written out by hand: 6 -> 3 layers, 128 -> 64 channels, 4 -> 2 heads of 32, 48 -> 24 embeddings."""
    config, state = large("EVA02-CLIP-debug"), weights_of(large("EVA02-CLIP-debug"))
    found = select_weights(state, config, small("EVA02-CLIP-debug"))
    channels, heads, embed = torch.arange(0, 128, 2), [*range(32), *range(64, 96)], torch.arange(0, 48, 2)
    theirs, ours = "visual.trunk.blocks.4.", "visual.trunk.blocks.2."
    for name in ("attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight"):
        assert torch.equal(found[ours + name], state[theirs + name][heads][:, channels])
    assert torch.equal(found[ours + "attn.proj.weight"], state[theirs + "attn.proj.weight"][channels][:, heads])
    assert torch.equal(found[ours + "attn.norm.weight"], state[theirs + "attn.norm.weight"][heads])
    hidden, wanted = state[theirs + "mlp.fc2.weight"].shape[1], found[ours + "mlp.fc2.weight"].shape[1]
    rows = torch.linspace(0, hidden - 1, wanted).round().long()
    for name in ("fc1_g", "fc1_x"):
        assert torch.equal(found[f"{ours}mlp.{name}.weight"], state[f"{theirs}mlp.{name}.weight"][rows][:, channels])
    assert torch.equal(found[ours + "mlp.fc2.weight"], state[theirs + "mlp.fc2.weight"][channels][:, rows])
    assert torch.equal(found["visual.trunk.head.weight"], state["visual.trunk.head.weight"][embed][:, channels])
    assert torch.equal(found["visual.trunk.pos_embed"], state["visual.trunk.pos_embed"][..., channels])
    assert torch.equal(found["text.text_projection"], state["text.text_projection"][:, embed])
    assert torch.equal(found["text.positional_embedding"], state["text.positional_embedding"][:16])
    block = "text.transformer.resblocks."
    assert torch.equal(found[f"{block}1.attn.in_proj_weight"], state[f"{block}3.attn.in_proj_weight"])
    assert torch.equal(found["logit_scale"], state["logit_scale"])


def test_packed_queries_keys_and_values_are_cut_alike() -> None:
    config, state = large("EVA01-CLIP-debug"), weights_of(large("EVA01-CLIP-debug"))
    found = select_weights(state, config, small("EVA01-CLIP-debug"), layers="first", channels="first")
    name = "visual.trunk.blocks.1.attn.qkv.weight"
    expected = state[name].reshape(3, 4, 32, 128)[:, :2, :, :64].reshape(192, 64)
    assert torch.equal(found[name], expected)


def test_layers_that_do_nothing_can_be_left_out() -> None:
    """Where the source's other blocks add nothing, the chosen ones compute what all of them do."""
    config = resized(
        resolve_preset("EVA02-CLIP-debug"), "deep", text={"layers": 4}, embed_dim=32, layers=6, width=64, head_width=32
    )
    target = resized(config, "half", text={"layers": 2}, embed_dim=32, layers=3)
    torch.manual_seed(0)
    deep = build_clip(config).eval()
    for tower, names in ((deep.visual.trunk.blocks, ("attn.proj", "mlp.fc2")), (deep.text.transformer.resblocks, None)):
        for block in list(tower)[1::2]:
            for name in names or ("attn.out_proj", "mlp.c_proj"):
                layer = block.get_submodule(name)
                torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    half = build_clip(target).eval()
    load_clip_weights(half, select_weights(dict(deep.named_parameters()), config, target))
    image, tokens = torch.randn(2, 3, 32, 32), torch.tensor([[62, 5, 7, 63] + 12 * [0]] * 2)
    with torch.no_grad():
        torch.testing.assert_close(half.encode_image(image), deep.encode_image(image))
        torch.testing.assert_close(half.encode_text(tokens), deep.encode_text(tokens))


def test_narrower_heads_keep_rotary_frequencies() -> None:
    """A head half as wide takes every other pair of a head, whose angles at each place are its own."""
    wide, narrow = (build_clip(resolve_preset(name)) for name in ("EVA02-CLIP-toy", "EVA02-CLIP-toy-small"))
    config, target = resolve_preset("EVA02-CLIP-toy"), resolve_preset("EVA02-CLIP-toy-small")
    state = {name: torch.arange(p.numel()).reshape(p.shape).float() for name, p in wide.named_parameters()}
    name = "visual.trunk.blocks.0.attn.q_proj.bias"
    with pytest.raises(CheckpointError, match="3 heads are wanted, EVA02-CLIP-toy has 2"):
        select_weights(state, config, target)
    fewer = resized(target, "fewer", text={"heads": 2, "width": 64}, embed_dim=128, width=64)
    dims = select_weights(state, config, fewer)[name].long()
    assert dims[:4].tolist() == [0, 1, 4, 5]
    assert dims[32:36].tolist() == [64, 65, 68, 69]
    angles = [clip.visual.trunk.rope.get_embed() for clip in (wide, narrow)]
    sines, cosines = (a.chunk(2, dim=-1) for a in angles)
    for part in (0, 1):
        torch.testing.assert_close(cosines[part], sines[part][:, dims[:32]])


def test_all_that_does_not_fit_is_said_at_once() -> None:
    state, config = weights_of(small("EVA02-CLIP-debug")), small("EVA02-CLIP-debug")
    with pytest.raises(CheckpointError) as error:
        select_weights(state, config, large("EVA-CLIP-18B-debug"))
    for part in (
        "visual: 6 layers are wanted, small has 3",
        "visual: 128 width are wanted, small has 64",
        "visual: rope is False, small has True",
        "visual: postnorm is True, small has False",
        "text: 6 layers are wanted, small has 2",
        "text: 20 positions are wanted, small has 16",
        "an embedding of 48 is wanted, small has 24",
    ):
        assert part in str(error.value)


PUBLISHED = [
    ("EVA02-CLIP-L-14", "EVA02-CLIP-B-16", ("visual", "text")),
    pytest.param("EVA02-CLIP-bigE-14-plus", "EVA02-CLIP-L-14", ("text",), marks=pytest.mark.slow),
    ("OpenCLIP-bigG-14", "EVA02-CLIP-L-14", ("text",)),
    ("OpenCLIP-L-14", "OpenCLIP-B-16", ("visual", "text")),
    pytest.param("OpenCLIP-H-14", "EVA02-CLIP-B-16", ("text",), marks=pytest.mark.slow),
    pytest.param("EVA-CLIP-8B", "EVA02-CLIP-bigE-14-plus", ("text",), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("source", "target", "towers"), PUBLISHED, ids=lambda value: str(value))
def test_published_models_can_start_smaller_ones(source: str, target: str, towers: tuple[str, ...]) -> None:
    """On the meta device: every parameter finds its shape, patches and image positions apart, which are resized."""
    register()
    with torch.device("meta"):
        have, want = (build_clip(resolve_preset(name)) for name in (source, target))
    state = dict(have.named_parameters())
    found = select_weights(state, resolve_preset(source), resolve_preset(target), towers=towers)
    grows = resolve_preset(target).embed_dim > resolve_preset(source).embed_dim
    resized = ("pos_embed", "patch_embed.proj.weight", "conv1.weight", "visual.positional_embedding")
    wanted = {name: p for name, p in want.named_parameters() if name.startswith(towers) and not name.endswith(resized)}
    for name, parameter in wanted.items():
        if not (grows and name.endswith(("text_projection", "visual.proj", "head.weight", "head.bias"))):
            assert found.shape(name) == tuple(parameter.shape), name


@pytest.mark.parametrize("kind", ["clip", "towers"])
def test_a_recipe_names_the_selection(kind: str, tmp_path: Path) -> None:
    config, target = large("EVA02-CLIP-debug"), small("EVA02-CLIP-debug")
    state = weights_of(config)
    (tmp_path / "model").mkdir()
    save_file(state, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "model_config.json").write_text(json.dumps(config.to_json()))
    select = schema.SelectSection(layers="first")
    path = tmp_path / "model"
    if kind == "clip":
        init = schema.WholeModelInit(path=path, select=select)
    else:
        image, text = (
            schema.ImageTowerSource(path=path, select=select),
            schema.TextTowerSource(path=path, select=select),
        )
        init = schema.TowersInit(image=image, text=text)
    section = schema.ClipModelSection(preset="EVA02-CLIP-debug", init=init)
    clip = build_clip(target)
    before = {name: p.detach().clone() for name, p in clip.named_parameters()}
    init_clip(clip, target, section)
    expected = select_weights(state, config, target, layers="first")
    fresh = () if kind == "clip" else ("visual.trunk.head.", "text.text_projection", "logit_scale")
    for name, value in clip.named_parameters():
        assert torch.equal(value, before[name] if name.startswith(fresh or "-") else expected[name]), name
    noted: dict = {}
    init_clip(build_clip(target), target, section, noted)
    assert all(torch.equal(noted[name](), expected[name].reshape(noted[name]().shape)) for name in noted)
    assert len(noted) == len([name for name in before if not name.startswith(fresh or "-")])
