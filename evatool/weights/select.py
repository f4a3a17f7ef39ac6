"""First weights of a small model from a larger one of the same kind of blocks: some of its layers, heads and channels.

The rule: of m layers, heads or channels n are taken; "even" takes every (m / n)-th where n divides m, else the n that
lie nearest to equal steps from the first to the last; "first" takes the first n. One choice of channels serves the
whole residual stream, so what one layer writes the next one reads; one of heads each block's queries, keys, values and
output; one of hidden channels both matrices of an MLP. Nothing is rescaled.
Source: weight selection (arXiv 2311.18823: even channels; first layers did best there); layers at equal steps:
DistilBERT (arXiv 1910.01108), TinyCLIP (arXiv 2309.12314). Heads stay whole, which the first of these does not see to.
Test: tests/model/test_selection.py.
"""

# m of the source, n of the model to start

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from evatool.core.errors import CheckpointError
from evatool.formats.safetensors import TensorMap, dtype_of, shape_of
from evatool.model.clip import PROJECTION, TOWER
from evatool.model.config import ModelConfig
from evatool.weights.key_mapping import canonical_state
from evatool.weights.mapped_tensors import MappedTensors, TensorOrigin

Rule = Literal["even", "first"]
Axis = Literal["all", "width", "heads", "qkv", "hidden", "packed", "embed", "positions"]

_EVA = {
    r"(cls_token|pos_embed)$": ("all", "all", "width"),
    r"patch_embed\.proj\.weight$": ("width", "all", "all", "all"),
    r"blocks\.\d+\.attn\.qkv\.weight$": ("qkv", "width"),
    r"blocks\.\d+\.attn\.qkv\.bias$": ("qkv",),
    r"blocks\.\d+\.attn\.[qkv]_proj\.weight$": ("heads", "width"),
    r"blocks\.\d+\.attn\.([qkv]_proj\.bias|[qkv]_bias|norm\.\w+)$": ("heads",),
    r"blocks\.\d+\.attn\.proj\.weight$": ("width", "heads"),
    r"blocks\.\d+\.mlp\.fc1(_g|_x)?\.weight$": ("hidden", "width"),
    r"blocks\.\d+\.mlp\.(fc1(_g|_x)?\.bias|norm\.\w+)$": ("hidden",),
    r"blocks\.\d+\.mlp\.fc2\.weight$": ("width", "hidden"),
    r"head\.weight$": ("embed", "width"),
    r"head\.bias$": ("embed",),
    # what is as wide as the residual stream: norms, output biases, layer scales
    r"(patch_embed\.proj|blocks\.\d+\.(norm\d|attn\.proj|mlp\.fc2)|norm|fc_norm)\.\w+$": ("width",),
    r"blocks\.\d+\.gamma_\d$": ("width",),
}
_CLIP = {
    r"token_embedding\.weight$": ("all", "width"),
    r"positional_embedding$": ("positions", "width"),
    r"(text_projection|proj)$": ("width", "embed"),
    r"conv1\.weight$": ("width", "all", "all", "all"),
    r"transformer\.resblocks\.\d+\.attn\.in_proj_weight$": ("qkv", "width"),
    r"transformer\.resblocks\.\d+\.attn\.in_proj_bias$": ("qkv",),
    r"transformer\.resblocks\.\d+\.attn\.out_proj\.weight$": ("width", "heads"),
    r"transformer\.resblocks\.\d+\.mlp\.c_fc\.weight$": ("hidden", "width"),
    r"transformer\.resblocks\.\d+\.mlp\.c_fc\.bias$": ("hidden",),
    r"transformer\.resblocks\.\d+\.mlp\.c_proj\.weight$": ("width", "hidden"),
    r"(class_embedding|ln_\w+\.\w+)$": ("width",),
    r"transformer\.resblocks\.\d+\.(ln_\d|attn\.out_proj|mlp\.c_proj|ls_\d)\.\w+$": ("width",),
}
_BLOCK = re.compile(r"(blocks\.)(\d+)(\.)")
# What makes two blocks compute different things, whatever their sizes.
_KINDS = ("tower", "rope", "naiveswiglu", "swiglu", "subln", "postnorm", "use_rms_norm", "qkv_bias")


def chosen(count: int, out_of: int, rule: Rule) -> list[int]:
    """The `count` numbers below `out_of` that are taken, in rising order."""
    if rule == "first":
        return list(range(count))
    if out_of % count == 0:
        return list(range(0, out_of, out_of // count))
    return [(2 * i * (out_of - 1) + count - 1) // (2 * (count - 1)) for i in range(count)]


@dataclass(frozen=True)
class _Shape:
    """Sizes of one tower."""

    layers: int
    width: int
    heads: int
    hidden: int
    embed: int | None
    positions: int = 0

    @property
    def head_width(self) -> int:
        return self.width // self.heads


class SelectedMap(TensorMap):
    """Part of a larger model's tensors, under a smaller model's names and in its shapes, each cut when it is read.

    Args:
        source: the larger model's, under our names.
        taken: the smaller model's name -> the source's name and, for each axis, which entries (None: all).
    """

    def __init__(self, source: Mapping[str, Tensor], taken: Mapping[str, tuple[str, list[list[int] | None]]]) -> None:
        self._source, self._taken = source, dict(taken)

    def __getitem__(self, name: str) -> Tensor:
        theirs, axes = self._taken[name]
        tensor = self._source[theirs].clone()
        for dim, entries in enumerate(axes):
            if entries is not None:
                tensor = tensor.index_select(dim, torch.tensor(entries))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._taken)

    def __len__(self) -> int:
        return len(self._taken)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape that the tensor will have."""
        theirs, axes = self._taken[name]
        sizes = zip(shape_of(self._source, theirs), axes, strict=True)
        return tuple(size if entries is None else len(entries) for size, entries in sizes)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype at the source."""
        return dtype_of(self._source, self._taken[name][0])


def select_weights(
    state: Mapping[str, Tensor],
    source: ModelConfig,
    target: ModelConfig,
    *,
    towers: tuple[str, ...] = ("visual", "text"),
    layers: Rule = "even",
    channels: Rule = "even",
    where: str = "state dict",
) -> MappedTensors:
    """First weights for `target`, cut out of a model that is as large or larger in everything.

    Image positions and the patch kernel keep the source's grid and patch: loading resizes them. Text positions are the
    first ones. Projections are left out where the embedding would have to grow.

    Args:
        state: the source's weights, in any naming that `canonical_state` knows.
        towers: those that are wanted; the temperature comes with both.
        layers, channels: which layers, and which channels and heads, are taken.
    Raises: CheckpointError with everything that does not fit.
    """
    known = canonical_state(state, where)
    problems: list[str] = []
    taken: dict[str, tuple[str, list[list[int] | None]]] = {}
    for tower in towers:
        pieces = _visual_shapes(known, source, target) if tower == "visual" else _text_shapes(known, source, target)
        found = _problems(tower, *pieces, source, target)
        problems += found
        if not found:
            taken |= _of_tower(known, tower, *pieces, layers=layers, channels=channels)
    if len(towers) > 1 and (source.embed_dim or 0) < (target.embed_dim or 0):
        problems.append(f"an embedding of {target.embed_dim} is wanted, {source.name} has {source.embed_dim}")
    if problems:
        raise CheckpointError(
            f"{target.name} cannot be cut out of {source.name}:\n  " + "\n  ".join(problems),
            where=where,
            expected="a model of the same kind of blocks, as large or larger in everything",
            fix="name such a model, or take only the tower that fits (model.init.kind = 'towers')",
        )
    if "logit_scale" in known and len(towers) > 1:
        taken["logit_scale"] = ("logit_scale", [None] * len(shape_of(known, "logit_scale")))
    selected = SelectedMap(known, taken)
    return MappedTensors(selected, {name: TensorOrigin((name,)) for name in selected}, known.tower)


def _visual_shapes(state: Mapping[str, Tensor], source: ModelConfig, target: ModelConfig) -> tuple[_Shape, _Shape]:
    def shape(config: ModelConfig, hidden: int) -> _Shape:
        return _Shape(config.depth, config.width, config.num_heads, hidden, config.embed_dim)

    hidden = next(
        (
            shape_of(state, name)[-1]
            for name in (f"{TOWER}blocks.0.mlp.fc2.weight", "visual.transformer.resblocks.0.mlp.c_proj.weight")
            if name in state
        ),
        0,
    )
    return shape(source, hidden), shape(target, int(target.width * target.vision["mlp_ratio"]))


def _text_shapes(state: Mapping[str, Tensor], source: ModelConfig, target: ModelConfig) -> tuple[_Shape, _Shape]:
    def shape(config: ModelConfig) -> _Shape:
        text: dict[str, Any] = config.text or {"layers": 0, "width": 1, "heads": 1, "mlp_ratio": 1}
        hidden = int(text["width"] * text["mlp_ratio"])
        return _Shape(text["layers"], text["width"], text["heads"], hidden, config.embed_dim, config.context_length)

    return shape(source), shape(target)


def _problems(tower: str, have: _Shape, want: _Shape, source: ModelConfig, target: ModelConfig) -> list[str]:
    found = []
    for what in ("layers", "width", "heads", "hidden", "positions"):
        m, n = getattr(have, what), getattr(want, what)
        if n > m:
            found.append(f"{tower}: {n} {what} are wanted, {source.name} has {m}")
    if want.head_width != have.head_width and have.head_width % (2 * want.head_width):
        found.append(
            f"{tower}: heads are {want.head_width} wide, {source.name}'s {have.head_width}: neither equal nor an even "
            "multiple, which keeps the pairs of rotary positions and their frequencies"
        )
    if tower == "visual":
        for key in _KINDS:
            if source.vision[key] != target.vision[key]:
                found.append(f"{tower}: {key} is {target.vision[key]}, {source.name} has {source.vision[key]}")
    if source.quick_gelu != target.quick_gelu:
        found.append(f"{tower}: one of the models uses QuickGELU")
    return found


def _of_tower(
    state: Mapping[str, Tensor], tower: str, have: _Shape, want: _Shape, *, layers: Rule, channels: Rule
) -> dict[str, tuple[str, list[list[int] | None]]]:
    """The tower's names of the smaller model, and what each is made of."""
    prefix = TOWER if tower == "visual" and f"{TOWER}cls_token" in state else f"{tower}."
    patterns = _EVA if prefix == TOWER else _CLIP
    entries = _entries(have, want, channels)
    here = {theirs: mine for mine, theirs in enumerate(chosen(want.layers, have.layers, layers))}
    embeds = want.embed is not None and have.embed is not None and want.embed <= have.embed
    taken: dict[str, tuple[str, list[list[int] | None]]] = {}
    for name in state:
        if not name.startswith(prefix) and not (name == PROJECTION and prefix == TOWER):
            continue
        inside = "head.weight" if name == PROJECTION else name.removeprefix(prefix)
        axes = next((axes for pattern, axes in patterns.items() if re.match(pattern, inside)), None)
        if axes is None or ("embed" in axes and not embeds):
            continue
        block = _BLOCK.search(name)
        if block is not None and int(block[2]) not in here:
            continue
        ours = name if block is None else _BLOCK.sub(lambda m: f"{m[1]}{here[int(m[2])]}{m[3]}", name, count=1)
        sizes = shape_of(state, name)
        taken[ours] = (name, [entries(axis, size) for axis, size in zip(axes, sizes, strict=True)])
    return taken


def _entries(have: _Shape, want: _Shape, rule: Rule) -> Callable[[str, int], list[int] | None]:
    """The entries that are taken of an axis of this kind and size; None where all are."""
    # Within a head, pairs at equal steps: rotary positions turn pairs, whose frequencies fall from pair to pair.
    step = have.head_width // want.head_width
    inside = [2 * step * pair + half for pair in range(want.head_width // 2) for half in (0, 1)]
    if step == 1:
        inside = list(range(have.head_width))
    heads = [head * have.head_width + i for head in chosen(want.heads, have.heads, rule) for i in inside]
    hidden = chosen(want.hidden, have.hidden, rule)

    def entries(axis: str, size: int) -> list[int] | None:
        match axis:
            case "width":
                found = chosen(want.width, have.width, rule)
            case "heads":
                found = heads
            case "qkv":
                found = [part * have.width + i for part in range(3) for i in heads]
            case "hidden":
                # a packed SwiGLU has gate and value one above the other
                found = [part * have.hidden + i for part in range(size // have.hidden) for i in hidden]
            case "embed":
                found = chosen(want.embed or 0, have.embed or 0, rule)
            case "positions" if want.positions:  # of words
                found = list(range(want.positions))
            case _:
                return None
        return None if found == list(range(size)) else found

    return entries


def describe_selection(source: ModelConfig, target: ModelConfig, towers: tuple[str, ...], layers: Rule) -> str:
    """A line for the log: which layers of which tower."""
    parts = []
    for tower in towers:
        have, want = ((config.depth if tower == "visual" else config.text_depth) for config in (source, target))
        if 0 < want <= have:
            taken = ", ".join(map(str, chosen(want, have, layers)))
            parts.append(f"{tower}: layers {taken} of {have}")
    return f"{target.name} from {source.name}: " + "; ".join(parts)
