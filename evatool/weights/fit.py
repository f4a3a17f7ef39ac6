"""A source's tensors against a module's parameters: what differs is refused and listed, what fits is copied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn

from evatool.core.errors import CheckpointError
from evatool.formats.safetensors import TensorMap, dtype_of, shape_of
from evatool.model.vision import restore_buffers
from evatool.weights.resize import PatchResize, resize_patch_kernel, resize_positions

SCALARS = ("logit_scale", "logit_bias")  # one number each: a scalar in published files, (1,) in training


@dataclass
class LoadReport:
    """A record of what loading did, in our names."""

    loaded: int = 0
    fresh: list[str] = field(default_factory=list)  # parameters that keep their first weights
    unused: list[str] = field(default_factory=list)  # tensors of the source with no place here, as expected
    resized: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{self.loaded} tensors loaded"]
        parts += [f"{len(self.fresh)} fresh ({_short(self.fresh)})"] if self.fresh else []
        parts += [f"{len(self.unused)} not used ({_short(self.unused)})"] if self.unused else []
        parts += [f"resized {', '.join(self.resized)}"] if self.resized else []
        return "; ".join(parts)


class FittedMap(TensorMap):
    """A source's tensors in the shapes of a module's parameters, read when asked for.

    Args:
        source: under the parameters' names.
        shapes: of the parameters that are wanted.
    """

    def __init__(
        self, source: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], patch_resize: PatchResize
    ) -> None:
        self._source, self._shapes, self._patch_resize = source, dict(shapes), patch_resize
        self.gives_copies = getattr(source, "gives_copies", False)

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        return _resized(self._source[name], name, shape, self._patch_resize).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the parameter."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype at the source."""
        return dtype_of(self._source, name)


@dataclass
class FittedWeights:
    """Tensors that have been checked against a module's parameters and not been read yet."""

    tensors: FittedMap
    report: LoadReport

    def fill(
        self, module: nn.Module, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> LoadReport:
        """Copy the tensors into the parameters of `module`, one at a time; then recompute what no file holds.

        Args:
            module: the one that was checked, or one of its shape. Parameters on the meta device are given memory.
            dtype, device: of parameters on the meta device; the temperature's dtype is float32.
        """
        may_keep = self.tensors.gives_copies
        for name in self.tensors:
            tensor = self.tensors[name]
            if _tensor_of(module, name).is_meta:
                # What was read for this parameter alone becomes its memory: nothing is held twice.
                tensor = tensor.to(device, torch.float32 if name in SCALARS else dtype, copy=not may_keep)
            _place(module, name, tensor)
        still_meta = [name for name in self.report.fresh if _tensor_of(module, name).is_meta]
        assert not still_meta, f"fresh parameters without memory: {still_meta}"
        restore_buffers(module, device)
        return self.report

    def readers(self) -> dict[str, Callable[[], Tensor]]:
        """By parameter name, what reads its tensor in its shape."""
        return {name: partial(self.tensors.__getitem__, name) for name in self.tensors}


def fit_weights(
    module: nn.Module,
    source: Mapping[str, Tensor],
    *,
    take: set[str],
    only: Callable[[str], bool] = lambda name: True,
    may_be_fresh: Sequence[str] = (),
    where: str = "state dict",
    patch_resize: PatchResize = "bicubic",
    named: Iterable[tuple[str, Tensor]] | None = None,
) -> FittedWeights:
    """Check the tensors named in `take` against the parameters of `module` that `only` selects; none is read.

    Args:
        module: may be on the meta device.
        source: under the names of the module's parameters.
        may_be_fresh: patterns (`*` for anything) of parameters that may be missing from `take`.
        where: what errors call the source.
        patch_resize: how a patch kernel of another size is resized.
        named: what of the module is filled, buffers too; its parameters when absent.
    Raises: CheckpointError with everything that is missing, left over or of another shape.
    """
    parameters = {name: p for name, p in (named or module.named_parameters()) if only(name)}
    missing = [name for name in parameters if name not in take]
    fresh = [name for name in missing if any(fnmatchcase(name, pattern) for pattern in may_be_fresh)]
    _refuse_differences(
        parameters, source, take=take, missing=[name for name in missing if name not in fresh], where=where
    )
    shapes = {name: tuple(p.shape) for name, p in parameters.items() if name in take}
    resized = [name for name, shape in shapes.items() if len(shape) > 1 and shape_of(source, name) != shape]
    report = LoadReport(loaded=len(take), fresh=fresh, resized=resized)
    return FittedWeights(FittedMap(source, shapes, patch_resize), report)


def _tensor_of(module: nn.Module, name: str) -> Tensor:
    """A parameter or a buffer."""
    parent, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(parent), leaf)
    return tensor


def _place(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Copy into a parameter that has memory; give `tensor`'s to one on the meta device."""
    parent_name, _, leaf = name.rpartition(".")
    parent = module.get_submodule(parent_name)
    parameter = getattr(parent, leaf)
    if parameter.is_meta:
        setattr(parent, leaf, nn.Parameter(tensor.contiguous(), requires_grad=parameter.requires_grad))
    else:
        with torch.no_grad():
            parameter.copy_(tensor)


def _resized(tensor: Tensor, name: str, shape: tuple[int, ...], patch_resize: PatchResize) -> Tensor:
    if name.endswith("pos_embed") and tuple(tensor.shape) != shape:
        side = round((shape[1] - 1) ** 0.5)
        return resize_positions(tensor, (side, side))
    if name.endswith("patch_embed.proj.weight"):
        return resize_patch_kernel(tensor, shape[-1], patch_resize)
    return tensor


def _refuse_differences(
    parameters: Mapping[str, Tensor], source: Mapping[str, Tensor], *, take: set[str], missing: list[str], where: str
) -> None:
    unexpected = sorted(name for name in take if name not in parameters)
    misfits = []
    for name in sorted(take - set(unexpected)):
        theirs, ours = tuple(shape_of(source, name)), tuple(parameters[name].shape)
        if not _can_fit(name, theirs, ours):
            misfits.append(f"{name} is {theirs}, the model has {ours}")
        elif not dtype_of(source, name).is_floating_point and parameters[name].is_floating_point():
            misfits.append(f"{name} holds {str(dtype_of(source, name)).removeprefix('torch.')}, not floating point")
    if not (missing or unexpected or misfits):
        return
    if not set(parameters) & take:
        what = "nothing in this file matches the model"
    else:
        counts = {"missing": len(missing), "unexpected": len(unexpected), "of another shape or kind": len(misfits)}
        what = "the weights do not fit the model: " + ", ".join(f"{n} {word}" for word, n in counts.items() if n)
    lines = [f"missing: {_short(missing)}"] if missing else []
    lines += [f"unexpected: {_short(unexpected)}"] if unexpected else []
    lines += misfits[:8] + ([f"... and {len(misfits) - 8} more"] if len(misfits) > 8 else [])
    raise CheckpointError("\n  ".join([what, *lines]), where=where, fix="name the model this file was made with")


def _can_fit(name: str, theirs: tuple[int, ...], ours: tuple[int, ...]) -> bool:
    if theirs == ours:
        return True
    if name in SCALARS:
        return len(theirs) <= 1 and len(ours) <= 1  # open_clip has both forms of one number
    if name.endswith("pos_embed"):
        return len(theirs) == 3 and theirs[::2] == ours[::2] and round((theirs[1] - 1) ** 0.5) ** 2 == theirs[1] - 1
    if name.endswith("patch_embed.proj.weight"):
        return len(theirs) == 4 and theirs[:2] == ours[:2] and theirs[2] == theirs[3]
    return False


def _short(names: list[str], limit: int = 6) -> str:
    shown = ", ".join(names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
