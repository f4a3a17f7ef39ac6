"""A model's tensors as they are written: which ones, in which dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from evatool.formats.safetensors import TensorMap, dtype_of, shape_of
from evatool.inference.loaded_clip import LoadedClip
from evatool.weights.fit import SCALARS
from evatool.weights.mapped_tensors import tensors_below

Tower = Literal["image", "text"]
_PREFIX = {"image": "visual.", "text": "text.", None: ""}


class CastMap(TensorMap):
    """A model's tensors in the dtype they are written in, each cast when it is asked for.

    The temperature keeps its value: it stays float32 where `dtype` cannot hold it. It is a scalar here, as published
    files have it; in training it is (1,), so that every engine can shard it.
    """

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._tensors, self._dtype = tensors, dtype

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name].detach()
        return tensor.to(self.dtype(name)).reshape(self.shape(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as written."""
        shape = shape_of(self._tensors, name)
        return () if name in SCALARS else shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype as written."""
        if name not in SCALARS:
            stored = dtype_of(self._tensors, name)
            return self._dtype if stored.is_floating_point else stored  # counters of batch norms
        tensor = self._tensors[name]
        if not torch.equal(tensor.to(self._dtype).to(tensor.dtype), tensor):
            return tensor.dtype
        return self._dtype


def written_tensors(clip: LoadedClip, tower: Tower | None = None) -> CastMap:
    """The tensors to write under our names, in the dtype that `round_weights` gave them; one tower or all."""
    prefix = _PREFIX[tower]
    state = {name: tensor for name, tensor in clip.model.state_dict().items() if name.startswith(prefix)}
    return CastMap(state, clip.stored_dtype)


def tower_tensors(tensors: Mapping[str, Tensor], tower: Tower | None, dtype: torch.dtype) -> CastMap:
    """The tensors of one tower or all, as they are written in `dtype`; each is read when asked for."""
    return CastMap(tensors_below(tensors, _PREFIX[tower]), dtype)


def round_weights(clip: LoadedClip, dtype: torch.dtype) -> None:
    """Round the float32 model to what `dtype` can hold, so that it is what a reader of the export will have."""
    for name, parameter in clip.model.named_parameters():
        if name not in SCALARS:
            parameter.data.copy_(parameter.data.to(dtype))
    clip.stored_dtype = dtype
