"""Random numbers that torch does not draw on the meta device, as one operation that a deferred build can replay."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_LIBRARY = torch.library.Library("evatool", "DEF")
_LIBRARY.define("trunc_normal_(Tensor(a!) tensor, float std) -> Tensor(a!)", tags=(torch.Tag.nondeterministic_seeded,))


def _draw(tensor: Tensor, std: float) -> Tensor:
    return nn.init.trunc_normal_(tensor, std=std)


def _do_nothing(tensor: Tensor, std: float) -> Tensor:
    return tensor


_LIBRARY.impl("trunc_normal_", _draw, "CompositeExplicitAutograd")
_LIBRARY.impl("trunc_normal_", _do_nothing, "Meta")


def trunc_normal_(tensor: Tensor, std: float) -> Tensor:
    """Fill a tensor with `torch.nn.init.trunc_normal_`'s numbers (mean 0, cut at -2 and 2), in place.

    torch rejects and draws again until all numbers are inside its bounds, and returns a meta tensor as it came: a build
    on the meta device would never hear of it, and the parameter would stay unfilled, or keep what was there before. As
    an operation of its own it is written down, and replayed with the same numbers.
    """
    with torch.no_grad():
        torch.ops.evatool.trunc_normal_(tensor, std)
    return tensor
