"""Counts what a timm teacher costs, on the meta device: shapes without memory. Run as a process by `plan/traced.py`.

`python -m evatool.teachers.trace '["NAME", LAYER, IMAGE_SIZE]'` prints one JSON object, the figures or an `error`.
"""

from __future__ import annotations

import json
import logging
import sys
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from evatool.core.errors import EvatoolError, RecipeError
from evatool.teachers.timm import load_timm_teacher


class LiveNumbers(TorchDispatchMode):
    """Counts the numbers in tensors that were made within it and are still referred to, now and at most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), tensor.element_size())
        return made

    def _count(self, storage: torch.UntypedStorage, element_size: int) -> None:
        if storage._cdata in self._known:  # a view
            return
        numbers = storage.nbytes() // element_size
        self._known.add(storage._cdata)
        self.now += numbers
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, storage._cdata, numbers)

    def _drop(self, key: int, numbers: int) -> None:
        self._known.discard(key)
        self.now -= numbers


def trace_timm_teacher(name: str, layer: int | None = None, image_size: int | None = None) -> dict[str, Any]:
    """Figures of a timm model as a teacher of patch features, by the fields of `plan.traced.TracedModel`.

    No weights are made, and no random number is drawn.

    Raises: RecipeError where the model is unknown, gives no grid of features, or does not run without memory.
    """
    try:
        with torch.device("meta"):
            teacher = load_timm_teacher(name, layer=layer, image_size=image_size, device="meta")
            image = torch.zeros(1, 3, teacher.image_size, teacher.image_size, dtype=torch.uint8)
        with FlopCounterMode(display=False) as counter:
            teacher.visual_tokens(image)
        with LiveNumbers() as live:
            teacher.visual_tokens(image)
    except (NotImplementedError, RuntimeError, AttributeError, TypeError) as error:  # what meta tensors refuse with
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise RecipeError(f"timm's {name} does not run on torch's meta device: {message}") from error
    return {
        "name": f"timm/{name}",
        "flops": int(counter.get_total_flops()),
        "params": sum(param.numel() for param in teacher.model.parameters()),
        "working_numbers": live.peak,
        "num_patches": teacher.grid[0] * teacher.grid[1],
        "embed_dim": teacher.embed_dim,
    }


def _main() -> None:
    """Print the figures of the model that the command line names, or why there are none."""
    logging.getLogger("evatool").setLevel(logging.ERROR)  # that the weights are random is no news here
    try:
        reply = trace_timm_teacher(*json.loads(sys.argv[1]))
    except EvatoolError as error:
        reply = {"error": error.what}
    print(json.dumps(reply))


if __name__ == "__main__":
    _main()
