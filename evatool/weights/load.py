"""Weights into models, exactly: what is missing, left over or of another shape is refused and listed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase as fnmatch
from functools import partial

import torch
from open_clip import CustomTextCLIP
from torch import Tensor, nn

from evatool.core.errors import CheckpointError
from evatool.formats.mapped_tensors import PROJECTION, TOWER, MappedTensors
from evatool.formats.safetensors import TensorMap, dtype_of, shape_of
from evatool.model.mae import MaeModel
from evatool.model.mim import MimModel
from evatool.model.vision import restore_buffers
from evatool.weights.key_mapping import canonical_state, mae_state
from evatool.weights.resize import PatchResize, resize_patch_kernel, resize_positions

# What starts fresh when a tower comes from another model (docs/reference/eva.md#clip-settings and
# #start-from-other-models). Patterns of our names.
IMAGE_PROJECTION = (PROJECTION, f"{TOWER}head.*")
ATTENTION_NORMS = f"{TOWER}blocks.*.attn.norm.*"
TEXT_PROJECTION = ("text.text_projection",)
SCALARS = ("logit_scale", "logit_bias")  # one number each: a scalar in published files, (1,) in training
DEFAULT_FRESH = (*IMAGE_PROJECTION, ATTENTION_NORMS, *TEXT_PROJECTION)

Sources = dict[str, Callable[[], Tensor]]
"""By parameter name, what reads its tensor, in its shape."""


@dataclass
class LoadReport:
    """What loading did, in our names."""

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


def init_image_tower(
    clip: CustomTextCLIP,
    state: Mapping[str, Tensor],
    *,
    where: str = "state dict",
    may_be_fresh: Sequence[str] | None = None,
    patch_resize: PatchResize = "bicubic",
    sources: Sources | None = None,
) -> LoadReport:
    """Give `clip` the image tower of a MIM or CLIP model, in any naming that `canonical_state` knows.

    Positions and the patch kernel are resized to `clip`'s. What else is missing, left over or of another shape raises
    CheckpointError, and `clip` is unchanged.

    Args:
        may_be_fresh: patterns (`*` for anything) of our names that keep their first weights. By default the projection
            and, where the source has none of them, the norms inside the attention (EVA-02's MIM models).
        patch_resize: how a patch kernel of another size is resized.
        sources: as in `load_parameters`.
    """
    source = canonical_state(state, where)
    if may_be_fresh is None:
        has_norms = any(fnmatch(name, ATTENTION_NORMS) for name in source)
        may_be_fresh = IMAGE_PROJECTION if has_norms else (*IMAGE_PROJECTION, ATTENTION_NORMS)
    return _init_tower(clip, source, "visual.", may_be_fresh, where, patch_resize, sources)


def init_text_tower(
    clip: CustomTextCLIP,
    state: Mapping[str, Tensor],
    *,
    where: str = "state dict",
    may_be_fresh: Sequence[str] | None = None,
    sources: Sources | None = None,
) -> LoadReport:
    """Give `clip` the text tower of a CLIP model, in any naming that `canonical_state` knows; as `init_image_tower`.

    By default the projection keeps its first weights, as in every EVA-CLIP (docs/reference/eva.md#clip-settings).
    """
    fresh = TEXT_PROJECTION if may_be_fresh is None else may_be_fresh
    return _init_tower(clip, canonical_state(state, where), "text.", fresh, where, "bicubic", sources)


def _init_tower(
    clip: CustomTextCLIP,
    source: MappedTensors,
    prefix: str,
    may_be_fresh: Sequence[str],
    where: str,
    patch_resize: PatchResize,
    sources: Sources | None,
) -> LoadReport:
    """Take what lies below `prefix`, less what stays fresh: a fresh parameter is not taken even where it fits."""
    stays_fresh = lambda name: any(fnmatch(name, pattern) for pattern in may_be_fresh)  # noqa: E731
    ours = [name for name, _ in clip.named_parameters() if name.startswith(prefix)]
    without_effect = [p for p in may_be_fresh if p not in DEFAULT_FRESH and not any(fnmatch(n, p) for n in ours)]
    if without_effect:
        raise CheckpointError(
            f"no parameter of the model matches {', '.join(without_effect)}",
            where=where,
            expected=f"patterns of names such as {', '.join(ours[:3])}",
        )
    take = {name for name in source if name.startswith(prefix) and not stays_fresh(name)}
    report = load_parameters(
        clip,
        source,
        only=lambda name: name.startswith(prefix),
        take=take,
        may_be_fresh=may_be_fresh,
        where=where,
        patch_resize=patch_resize,
        sources=sources,
    )
    report.unused = [name for name in source if name not in take]
    return report


def load_clip_weights(
    clip: CustomTextCLIP,
    state: Mapping[str, Tensor],
    *,
    where: str = "state dict",
    patch_resize: PatchResize = "bicubic",
    dtype: torch.dtype = torch.float32,
    sources: Sources | None = None,
) -> LoadReport:
    """All weights of a CLIP model, in any naming that `canonical_state` knows; image positions and the patch kernel are
    resized to fit.

    Raises CheckpointError, leaving `clip` unchanged, unless every parameter has its tensor and every tensor its place.

    Args:
        dtype: of parameters that are on the meta device and get their memory here; the temperature's is float32.
        sources: as in `load_parameters`.
    """
    source = canonical_state(state, where)
    return load_parameters(
        clip, source, take=set(source), where=where, patch_resize=patch_resize, dtype=dtype, sources=sources
    )


class FittedMap(TensorMap):
    """A file's tensors as a model's parameters need them: under our names, in their shapes, read when asked for."""

    def __init__(
        self, source: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], patch_resize: PatchResize
    ) -> None:
        self._source, self._shapes, self._patch_resize = source, dict(shapes), patch_resize
        self.gives_copies = getattr(source, "gives_copies", False)

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        return _fitted(self._source[name], name, shape, self._patch_resize).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the parameter."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in the file."""
        return dtype_of(self._source, name)


def fitted_clip_weights(
    clip: CustomTextCLIP, state: Mapping[str, Tensor], *, where: str, patch_resize: PatchResize = "bicubic"
) -> FittedMap:
    """What `load_clip_weights` would give `clip` (which may be on the meta device), without giving it.

    Raises: CheckpointError as `load_clip_weights`.
    """
    source = canonical_state(state, where)
    parameters = dict(clip.named_parameters())
    missing = [name for name in parameters if name not in source]
    _refuse_differences(parameters, source, take=set(source), missing=missing, where=where)
    return FittedMap(source, {name: tuple(p.shape) for name, p in parameters.items()}, patch_resize)


def load_mim_weights(
    model: MimModel | MaeModel, state: Mapping[str, Tensor], *, where: str = "state dict"
) -> LoadReport:
    """All weights of a MIM model from our checkpoint or a file of BAAI's. Raises CheckpointError as above."""
    if isinstance(model, MaeModel):
        ours = mae_state(state)
        return load_parameters(model, ours, take=set(ours), where=where)
    source = canonical_state(state, where)
    ours = source.renamed({name: "visual." + name.removeprefix(TOWER) for name in source if name.startswith(TOWER)})
    return load_parameters(model, ours, take=set(ours), where=where)


def load_parameters(
    module: nn.Module,
    source: Mapping[str, Tensor],
    *,
    take: set[str],
    only: Callable[[str], bool] = lambda name: True,
    may_be_fresh: Sequence[str] = (),
    where: str = "state dict",
    patch_resize: PatchResize = "bicubic",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    sources: Sources | None = None,
) -> LoadReport:
    """Copy the tensors named in `take` into the parameters of `module` that `only` selects, one at a time.

    Parameters on the meta device are given memory of their own on `device`, of `dtype` (the temperature: float32); then
    buffers that no checkpoint holds are recomputed. Shapes are checked before anything is written.

    Args:
        may_be_fresh: patterns (`*` for anything) of parameters that may be missing from `source`.
        sources: where it is given, the module stays as it is, and this is told how to read each tensor that it would
            have been given.
    """
    parameters = {name: p for name, p in module.named_parameters() if only(name)}
    missing = [name for name in parameters if name not in take]
    fresh = [name for name in missing if any(fnmatch(name, pattern) for pattern in may_be_fresh)]
    _refuse_differences(
        parameters, source, take=take, missing=[name for name in missing if name not in fresh], where=where
    )
    report = LoadReport(loaded=len(take), fresh=fresh)
    for name in take:
        if tuple(shape_of(source, name)) != tuple(parameters[name].shape) and parameters[name].ndim > 1:
            report.resized.append(name)
    if sources is not None:
        fitted = FittedMap(source, {name: tuple(parameters[name].shape) for name in take}, patch_resize)
        sources.update({name: partial(fitted.__getitem__, name) for name in take})
        return report
    may_keep = getattr(source, "gives_copies", False)
    for name in take:
        target = parameters[name]
        tensor = _fitted(source[name], name, tuple(target.shape), patch_resize)
        tensor = tensor.reshape(target.shape)
        if target.is_meta:
            # what was read for this parameter alone becomes its memory: nothing is held twice
            tensor = tensor.to(device, torch.float32 if name in SCALARS else dtype, copy=not may_keep)
        _place(module, name, tensor)
    still_meta = [name for name in fresh if parameters[name].is_meta]
    assert not still_meta, f"fresh parameters without memory: {still_meta}"
    restore_buffers(module, device)
    return report


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


def _fitted(tensor: Tensor, name: str, shape: tuple[int, ...], patch_resize: PatchResize) -> Tensor:
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
        elif not dtype_of(source, name).is_floating_point:
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
