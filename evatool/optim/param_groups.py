"""Parameter groups by tower, layer and decay (docs/reference/eva.md#parameter-groups)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from evatool.core.errors import RecipeError
from evatool.core.param_group import ParamGroup, ParamOwner, Tower
from evatool.recipe.schema import GroupSection, OptimSection

__all__ = ["ParamGroup", "build_param_groups", "decays", "group_table", "layer_of", "tower_of"]

EMBEDDING_PARTS = (
    "patch_embed",
    "pos_embed",
    "cls_token",
    "mask_token",
    "conv1",
    "class_embedding",
    "ln_pre",
    "positional_embedding",
    "token_embedding",
)
"""A name that contains one of these belongs to layer 0."""

NO_DECAY_PARTS = ("pos_embed", "cls_token", "positional_embedding", "logit_scale")
"""Last parts of names that are not decayed whatever their shape; `mask_token`, `token_embedding` and
`text_projection` are decayed."""

TOWERS: dict[Tower, tuple[str, ...]] = {
    "visual": ("visual.", "mask_token"),  # the mask token is an input of the image tower
    "text": ("text.",),
    "other": ("logit_scale", "lm_head.", "decoder_embed.", "decoder_blocks.", "decoder_norm."),
}
"""A model's parameter belongs to the tower of which it has a prefix, its own name if that has no dot: CLIP's towers and
temperature, a MIM student's mask token and head, a masked autoencoder's decoder."""

_TOWERS: tuple[Tower, ...] = ("visual", "text", "other")
_BLOCK = re.compile(r"blocks\.(\d+)\.")  # `resblocks` too


def tower_of(name: str) -> Tower | None:
    """The tower of a model's parameter, named with or without the objective's `model.`; None if it is of none."""
    own = name.removeprefix("model.")
    for tower, prefixes in TOWERS.items():
        if any(own.startswith(prefix) if prefix.endswith(".") else own == prefix for prefix in prefixes):
            return tower
    return None


def layer_of(name: str, depth: int) -> int:
    """Layer of a tower's parameter: 0 the embeddings, i + 1 block i, depth + 1 everything after the blocks."""
    if any(part in name for part in EMBEDDING_PARTS):
        return 0
    block = _BLOCK.search(name)
    return int(block.group(1)) + 1 if block else depth + 1


def decays(name: str, ndim: int) -> bool:
    """True if weight decay applies: a matrix or larger that is neither a bias nor exempt by name."""
    return ndim >= 2 and not name.endswith(".bias") and name.rpartition(".")[2] not in NO_DECAY_PARTS


def build_param_groups(
    named_parameters: Iterable[tuple[str, Tensor]],
    section: OptimSection,
    *,
    depth_visual: int,
    depth_text: int,
    owners: Mapping[str, ParamOwner] | None = None,
) -> list[ParamGroup]:
    """One group per tower, layer, factor of the owner and decay; without layer decay a tower has two groups.

    Args:
        named_parameters: the objective's; frozen ones are left out.
        depth_visual, depth_text: blocks of each tower; `depth_text` is ignored where there is no text tower.
        owners: where parameters outside the model learn, by name: the objective's `parameter_owners()`.
    Returns: groups in the order visual, text, other, from the first layer to the last, decayed first; parameters keep
        the order in which they came.
    Raises: RecipeError, with all problems, where a section names a tower without parameters, a tower has no section,
        a parameter is of no tower and has no owner, or a block lies beyond the tower's depth.
    Source: EVA-CLIP/rei/training/optim.py (docs/reference/eva.md#parameter-groups).
    """
    sections = {"visual": section.visual, "text": section.text, "other": section.other or section.visual}
    depths = {"visual": depth_visual, "text": depth_text, "other": 0}
    groups: dict[tuple[Tower, int | None, float, bool], ParamGroup] = {}
    trained = [(name, param) for name, param in named_parameters if param.requires_grad]
    owned, problems = _owned([name for name, _ in trained], owners or {})
    problems += _section_problems(section, {owner.tower for owner in owned.values()})
    for name, param in trained:
        owner = owned.get(name)
        settings = None if owner is None else sections[owner.tower]
        if owner is None or settings is None:
            continue  # among the problems already
        tower = owner.tower
        layer = layer_of(name, depths[tower])
        block = _BLOCK.search(name)
        if tower != "other" and block is not None and int(block.group(1)) >= depths[tower]:
            problems.append(
                f"{name} is in block {block.group(1)}, but the {tower} tower is said to have {depths[tower]}"
            )
        has_layers = settings.layer_decay < 1 and tower != "other"
        key = (tower, layer if has_layers else None, owner.lr_scale, decays(name, param.ndim))
        if key not in groups:
            groups[key] = _new_group(settings, *key, num_layers=depths[tower] + 1)
        groups[key].params.append(param)
        groups[key].param_names.append(name)
    if problems:
        raise RecipeError("the optimiser's parameter groups do not fit the model", problems=problems, where="optim")
    in_order = sorted(groups, key=lambda k: (_TOWERS.index(k[0]), -1 if k[1] is None else k[1], -k[2], not k[3]))
    return [groups[key] for key in in_order]


def _owned(names: list[str], owners: Mapping[str, ParamOwner]) -> tuple[dict[str, ParamOwner], list[str]]:
    """The owner of each parameter, and the problems: parameters of no tower and no loss are never guessed at."""
    owned: dict[str, ParamOwner] = {}
    unowned: list[str] = []
    for name in names:
        tower = tower_of(name)
        if name in owners:
            owned[name] = owners[name]
        elif tower is not None:
            owned[name] = ParamOwner(tower)
        else:
            unowned.append(name)
    if not unowned:
        return owned, []
    named = ", ".join(unowned[:4]) + (", ..." if len(unowned) > 4 else "")
    return owned, [
        f"{len(unowned)} parameters are of no tower and no loss ({named}): a model's begin with "
        f"{', '.join(prefix for prefixes in TOWERS.values() for prefix in prefixes)}; a loss declares its own with "
        "add_part"
    ]


def group_table(groups: Iterable[ParamGroup]) -> list[list[str]]:
    """One row a group for people to read, a header row first."""
    rows = [["group", "lr", "lr factor", "weight decay", "tensors", "parameters"]]
    for group in groups:
        count = sum(p.numel() for p in group.params)
        numbers = [f"{group.lr:g}", f"{group.lr_scale:.4g}", f"{group.weight_decay:g}", str(len(group.params))]
        rows.append([group.name, *numbers, f"{count:,}"])
    return rows


def _new_group(
    settings: GroupSection, tower: Tower, layer: int | None, scale: float, has_decay: bool, *, num_layers: int
) -> ParamGroup:
    in_between = [] if layer is None else [f"layer_{layer:02d}"]
    in_between += [] if scale == 1 else [f"lr_x{scale:g}"]
    parts = [tower, *in_between, "decay" if has_decay else "no_decay"]
    return ParamGroup(
        name="/".join(parts),
        tower=tower,
        layer=layer,
        lr=settings.lr,
        lr_scale=scale * (1.0 if layer is None else settings.layer_decay ** (num_layers - layer)),
        weight_decay=settings.weight_decay if has_decay else 0.0,
        params=[],
        param_names=[],
    )


def _section_problems(section: OptimSection, towers: set[Tower]) -> list[str]:
    problems = [
        f"optim.{tower} is set, but the model has no trainable parameter there: remove the section"
        for tower in _TOWERS
        if getattr(section, tower) is not None and tower not in towers
    ]
    if "text" in towers and section.text is None:
        problems.append("optim.text is missing, but the model has a text tower: give it at least `lr`")
    if section.other is not None and section.other.layer_decay != 1:
        problems.append("optim.other.layer_decay has no effect: parameters outside the towers have no layers")
    return problems
