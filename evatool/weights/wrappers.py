"""The model inside a file, without what training programs put around it: prefixes, tables beside it, an average of it.

Which prefix a model lies under is found from the names below it, and not looked up in a list: every prefix under which
a known kind of model is complete is a root. Inside a model, names that begin with an underscore and `module` are those
of wrappers (`_orig_mod`, `_checkpoint_wrapped_module`, `_fsdp_wrapped_module`): no architecture has such names.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from evatool.core.errors import CheckpointError
from evatool.formats.safetensors import TensorMap, dtype_of, shape_of

log = logging.getLogger(__name__)

# Beside weights in training files: numbers of an optimiser under the weights' names, and a counter of torch's average.
_NO_WEIGHTS = re.compile(
    r"(^|\.)(optim\w*|scaler|lr_scheduler\w*)\.|\.(exp_avg\w*|momentum_buffer|step)$|(^|\.)n_averaged$"
)
_AVERAGE = re.compile(r"(^|[._])(ema|swa|avg|average|averaged|shadow)([._]|$)")
# First parts of the names inside a model: a root below another root and one of these is a piece of that model.
_PIECES = ("visual", "text", "vision_model", "text_model", "trunk")
# How names below a root begin by which a model is known: of each group of one line there must be a name.
_Groups = tuple[tuple[str, ...], ...]
_WHOLE: tuple[_Groups, ...] = (
    (("visual.",), ("logit_scale", "text.", "token_embedding.", "transformer.")),
    (("vision_model.",), ("text_model.",)),
)
_TOWERS: tuple[_Groups, ...] = (
    (("cls_token", "pos_embed", "mask_token"), ("patch_embed.",), ("blocks.0.",)),
    (("visual.trunk.", "visual.patch_embed.", "visual.conv1.", "visual.stem.", "visual.blocks."),),
    (("vision_model.embeddings.",),),
)
# Where no known model lies in a file: the tables in which training programs keep weights, in EVA's order.
_USUAL_TABLES = ("model_ema", "model", "module", "state_dict")


@dataclass(frozen=True)
class _Root:
    """A model in a file: the prefix of its names once wrappers are taken out, and as the file has it."""

    prefix: str
    label: str

    @property
    def is_average(self) -> bool:
        return bool(_AVERAGE.search(self.label))


class UnwrappedMap(TensorMap):
    """Some tensors of a file under the names that they have without wrappers, read when asked for.

    Args:
        base: the file's tensors.
        keys: name without wrappers -> name in the file.
    """

    def __init__(self, base: Mapping[str, Tensor], keys: Mapping[str, str]) -> None:
        self._base, self._keys = base, dict(keys)
        self.gives_copies = getattr(base, "gives_copies", False)

    def __getitem__(self, name: str) -> Tensor:
        return self._base[self._keys[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in the file."""
        return shape_of(self._base, self._keys[name])

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in the file."""
        return dtype_of(self._base, self._keys[name])


def without_wrappers(key: str) -> str:
    """A name without the parts that wrapping modules add, wherever they stand in it."""
    *modules, leaf = key.split(".")
    kept = [part for part in modules if part != "module" and not part.startswith("_")]
    return ".".join([*kept, leaf])


def unwrapped(
    state: Mapping[str, Tensor], where: str = "state dict", weights: str | None = None
) -> Mapping[str, Tensor]:
    """The one model among `state`'s tensors, under its own names; `state` itself where nothing is around it.

    Args:
        where: what errors call the source.
        weights: which of several models: `raw`, `ema` for the average, or the prefix that an error named. When None
            the average is taken where it stands beside the weights that it is of, as timm does, and a warning says so.
    Raises: CheckpointError where several complete models are there and `weights` does not tell which, or tells one
    that is not there, or where two names are one.
    """
    keys: dict[str, list[str]] = {}
    for key in state:
        if not _NO_WEIGHTS.search(key):
            keys.setdefault(without_wrappers(key), []).append(key)
    root = _chosen(_roots(keys), weights, where)
    found: dict[str, str] = {}
    for name, in_file in keys.items():
        if name.startswith(root):
            if len(in_file) > 1:
                raise CheckpointError(
                    f"{in_file[1]} and {in_file[0]} are both {name.removeprefix(root)}",
                    where=where,
                    expected="one tensor a parameter",
                )
            found[name.removeprefix(root)] = in_file[0]
    if len(found) == len(state) and all(name == key for name, key in found.items()):
        return state
    return UnwrappedMap(state, found)


def _roots(keys: Mapping[str, list[str]]) -> list[_Root]:
    """Every complete model; where there is none, every image tower; else the usual table, or nothing around it."""
    for lines in (_WHOLE, _TOWERS):
        prefixes: set[str] = set()
        for groups in lines:
            prefixes |= set.intersection(*(_prefixes(starts, keys) for starts in groups))
        outer = [prefix for prefix in prefixes if not any(_is_piece(prefix, other) for other in prefixes)]
        if outer:
            return [_Root(prefix, _label(prefix, keys)) for prefix in sorted(outer)]
    usual = (f"{table}." for table in _USUAL_TABLES)
    prefix = next((prefix for prefix in usual if any(name.startswith(prefix) for name in keys)), "")
    return [_Root(prefix, prefix)]


def _prefixes(starts: tuple[str, ...], names: Iterable[str]) -> set[str]:
    """What stands before a part of a name that begins in one of these ways; "" where the name itself does."""
    found: set[str] = set()
    for name in names:
        at = 0
        while True:
            if name.startswith(starts, at):
                found.add(name[:at])
            at = name.find(".", at) + 1
            if at == 0:
                break
    return found


def _is_piece(prefix: str, other: str) -> bool:
    """True where the model at `prefix` is a piece of the one at `other`."""
    return prefix != other and prefix.startswith(other) and prefix[len(other) :].split(".")[0] in _PIECES


def _label(prefix: str, keys: Mapping[str, list[str]]) -> str:
    """The prefix as the file has it, with the wrappers that stand in front of all its names."""
    names = [in_file[0] for name, in_file in keys.items() if name.startswith(prefix)]
    label = ""
    for part in names[0].split(".")[:-1]:
        longer = f"{label}{part}."
        if not prefix.startswith(_plain(longer)) or not all(name.startswith(longer) for name in names):
            break
        label = longer
    return label


def _plain(prefix: str) -> str:
    return without_wrappers(f"{prefix}x").removesuffix("x")


def _chosen(roots: list[_Root], weights: str | None, where: str) -> str:
    fits = roots
    if weights in ("raw", "ema"):
        fits = [root for root in roots if root.is_average == (weights == "ema")]
    elif weights is not None:
        fits = [root for root in roots if weights.rstrip(".") in (root.label.rstrip("."), root.prefix.rstrip("."))]
    if len(fits) == 1 and (len(roots) == 1 or weights is not None):
        return fits[0].prefix
    averages = [root for root in roots if root.is_average]
    if weights is None and len(roots) == 2 and len(averages) == 1:
        raw = next(root for root in roots if not root.is_average)
        log.warning(
            "%s holds weights (%s) and their average (%s): the average is taken; weights = 'raw' takes the others",
            *(where, raw.label or "at its root", averages[0].label),
        )
        return averages[0].prefix
    named = ", ".join(repr(root.label) if root.label else "its root" for root in roots)
    if not fits:
        raise CheckpointError(
            f"weights = {weights!r}, but the file has none such: its models are at {named}",
            where=where,
            fix="leave weights out, or name one of these",
        )
    raise CheckpointError(
        f"{len(fits)} complete models are in this file: {named}",
        where=where,
        expected="one, or a model and its average",
        fix=f"say which: weights = {fits[0].label.rstrip('.')!r}",
    )
