"""Parameter groups by tower, layer and decay (docs/reference/eva.md#parameter-groups)."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor

from evatool.core.errors import RecipeError
from evatool.core.param_group import ParamGroup
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

_TOWERS = ("visual", "text", "other")
_BLOCK = re.compile(r"blocks\.(\d+)\.")  # `resblocks` too


def tower_of(name: str) -> str:
    """ "visual", "text" or "other" by the parameter's name."""
    if "visual." in name or "mask_token" in name:  # the mask token is an input of the image tower
        return "visual"
    return "text" if "text." in name else "other"


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
    named_parameters: Iterable[tuple[str, Tensor]], section: OptimSection, *, depth_visual: int, depth_text: int
) -> list[ParamGroup]:
    """One group per tower, layer and decay; without layer decay a tower has two groups.

    Args:
        named_parameters: the objective's; frozen ones are left out.
        depth_visual, depth_text: blocks of each tower; `depth_text` is ignored where there is no text tower.
    Returns: groups in the order visual, text, other, from the first layer to the last, decayed first; parameters keep
        the order in which they came.
    Raises: RecipeError, with all problems, where a section names a tower without parameters, a tower has no section,
        or a block lies beyond the tower's depth.
    Source: EVA-CLIP/rei/training/optim.py (docs/reference/eva.md#parameter-groups).
    """
    sections = {"visual": section.visual, "text": section.text, "other": section.other or section.visual}
    depths = {"visual": depth_visual, "text": depth_text, "other": 0}
    groups: dict[tuple[str, int | None, bool], ParamGroup] = {}
    trained = [(name, param) for name, param in named_parameters if param.requires_grad]
    problems = _section_problems(section, {tower_of(name) for name, _ in trained})
    for name, param in trained:
        tower = tower_of(name)
        settings = sections[tower]
        if settings is None:
            continue  # reported by _section_problems
        layer = layer_of(name, depths[tower])
        block = _BLOCK.search(name)
        if tower != "other" and block is not None and int(block.group(1)) >= depths[tower]:
            problems.append(
                f"{name} is in block {block.group(1)}, but the {tower} tower is said to have {depths[tower]}"
            )
        has_layers = settings.layer_decay < 1 and tower != "other"
        key = (tower, layer if has_layers else None, decays(name, param.ndim))
        if key not in groups:
            groups[key] = _new_group(settings, tower, key[1], key[2], num_layers=depths[tower] + 1)
        groups[key].params.append(param)
        groups[key].param_names.append(name)
    if problems:
        raise RecipeError("the optimiser's parameter groups do not fit the model", problems=problems, where="optim")
    in_order = sorted(groups, key=lambda k: (_TOWERS.index(k[0]), -1 if k[1] is None else k[1], not k[2]))
    return [groups[key] for key in in_order]


def group_table(groups: Iterable[ParamGroup]) -> list[list[str]]:
    """One row a group for people to read, a header row first."""
    rows = [["group", "lr", "lr factor", "weight decay", "tensors", "parameters"]]
    for group in groups:
        count = sum(p.numel() for p in group.params)
        numbers = [f"{group.lr:g}", f"{group.lr_scale:.4g}", f"{group.weight_decay:g}", str(len(group.params))]
        rows.append([group.name, *numbers, f"{count:,}"])
    return rows


def _new_group(
    settings: GroupSection, tower: str, layer: int | None, has_decay: bool, *, num_layers: int
) -> ParamGroup:
    parts = [tower, *([] if layer is None else [f"layer_{layer:02d}"]), "decay" if has_decay else "no_decay"]
    return ParamGroup(
        name="/".join(parts),
        tower=tower,
        layer=layer,
        lr=settings.lr,
        lr_scale=1.0 if layer is None else settings.layer_decay ** (num_layers - layer),
        weight_decay=settings.weight_decay if has_decay else 0.0,
        params=[],
        param_names=[],
    )


def _section_problems(section: OptimSection, towers: set[str]) -> list[str]:
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
