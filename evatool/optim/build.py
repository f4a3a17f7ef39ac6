"""The recipe's optimiser over parameter groups; an engine steps it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from evatool.core.param_group import ParamGroup
from evatool.optim.lamb import Lamb
from evatool.recipe.schema import LambSection, OptimSection


def build_optimizer(section: OptimSection, groups: Sequence[ParamGroup]) -> torch.optim.Optimizer:
    """LAMB or AdamW with one group per `ParamGroup`, at learning rate 0 until the first `set_lrs`.

    AdamW is torch's fused kernel, the fastest exact choice on both devices: with a 49408 x 128 embedding on one CPU
    core a step took 6 ms against 17 ms for `foreach` and for the plain loop. It also clips on the way (`grad_scale`)
    and leaves everything as it was where `found_inf` is set, without the CPU waiting for the GPU.
    """
    match section:
        case LambSection(betas=betas, eps=eps, variant=variant, virtual_world_size=virtual):
            return Lamb(groups, betas=betas, eps=eps, variant=variant, virtual_world_size=virtual)
        case _:
            # lr 0: DeepSpeed steps once while it sets up, which must not decay any weight.
            settings = [{"params": group.params, "weight_decay": group.weight_decay} for group in groups]
            return torch.optim.AdamW(settings, lr=0.0, betas=section.betas, eps=section.eps, fused=True)
