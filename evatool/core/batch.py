"""One rank's samples of a step. No torch at run time: the command line may import this."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor

# B batch, S input side in pixels, T a teacher's input side, N patches, L text tokens

LossDict = dict[str, "Tensor"]
"""Scalar losses by name with `"loss"` (the one to minimise, with gradient) among them; the others are only logged."""

# How a field follows its batch. Each field names one of these as its `metadata`; a field of a subclass does so too.
ON_DEVICE: Mapping[str, Any] = {"rows": "tensor", "is_moved": True}
"""A tensor with one row a sample, or a list or dict of such; it is sliced, pinned and moved with the batch."""
ON_CPU: Mapping[str, Any] = {"rows": "tensor", "is_moved": False}
"""A tensor with one row a sample that the CPU reads: it is sliced, and stays on the CPU in ordinary memory."""
BY_SAMPLE: Mapping[str, Any] = {"rows": "list", "is_moved": False}
"""A list with one entry a sample; it is sliced."""
OF_BATCH: Mapping[str, Any] = {"rows": None, "is_moved": False}
"""A plain value of the batch as a whole; every part of it keeps it."""


@dataclass
class Batch:
    """One rank's samples of one optimiser step, on the CPU until the engine moves them.

    A field that is added, here or in a subclass, is moved, pinned and sliced by what its metadata says.
    """

    image: Tensor = field(metadata=ON_DEVICE)
    """(B, 3, S, S) uint8 RGB; normalised on the device."""
    keys: list[str] = field(metadata=BY_SAMPLE)
    """Sample keys, for error messages."""
    tokens: Tensor | None = field(default=None, metadata=ON_DEVICE)
    """(B, L) int64, zero-padded after the end-of-text token, which is the largest id."""
    caption_id: Tensor | None = field(default=None, metadata=ON_DEVICE)
    """(B,) int64; equal ids if and only if the captions are equal."""
    mask: Tensor | None = field(default=None, metadata=ON_DEVICE)
    """(B, N) bool, True where the student does not see the patch."""
    teacher_image: Tensor | None = field(default=None, metadata=ON_DEVICE)
    """(B, 3, T, T) uint8, the same crop at the teacher's size."""
    teacher_images: list[Tensor] | None = field(default=None, metadata=ON_DEVICE)
    """The same crop at the sizes of further teachers."""
    sample: Tensor | None = field(default=None, metadata=ON_CPU)
    """(B,) int64: the place of each sample in the run, by which its dropout is drawn."""
    position: int = field(default=0, metadata=OF_BATCH)
    """Global samples consumed once this batch is used; the loader's whole state."""
    text_lengths: Tensor | None = field(default=None, metadata=ON_CPU)
    """(B,) int64: tokens up to the end-of-text token."""
    extras: dict[str, Tensor] | None = field(default=None, metadata=ON_DEVICE)
    """Name -> (B, ...) float16 or float32, arrays stored beside the samples."""
    valid: Tensor | None = field(default=None, metadata=ON_CPU)
    """(B,) bool: False for samples that only fill up the last batch of a pass."""
    stored: dict[str, Tensor] | None = field(default=None, metadata=ON_DEVICE)
    """Teacher -> (B, ...) float16, its stored features; a teacher of which any is missing is absent."""
    store_rows: Tensor | None = field(default=None, metadata=ON_CPU)
    """(B, 4) int64: source, shard, number in the shard, view."""

    def __post_init__(self) -> None:
        # Found out while the tokens are on the CPU: reading them from a GPU would make the CPU wait for it.
        if self.tokens is not None and self.text_lengths is None:
            self.text_lengths = self.tokens.argmax(dim=-1).cpu() + 1

    def to(self, device: Any) -> Self:
        """The same batch with its tensors on `device`; those that the CPU reads stay where they are."""
        return self._changed(lambda tensor: tensor.to(device, non_blocking=True), _is_moved)

    def pin_memory(self) -> Self:
        """The same batch in pinned memory, from which `to` a GPU does not wait; a DataLoader calls it."""
        return self._changed(lambda tensor: tensor.pin_memory(), _is_moved)

    def rows(self, rows: slice) -> Self:
        """Some of the samples; the position stays the whole batch's."""
        return self._changed(lambda values: values[rows], _has_rows)

    def at_position(self, position: int) -> Self:
        """The same samples at another place in a run."""
        return replace(self, position=position)

    def _changed(self, change: Callable[[Any], Any], is_chosen: Callable[[Mapping[str, Any]], bool]) -> Self:
        """A copy in which `change` was applied to what stands in the chosen fields."""
        changes: dict[str, Any] = {}
        for f in fields(self):
            assert "rows" in f.metadata, f"{type(self).__name__}.{f.name} has no metadata of evatool.core.batch"
            if is_chosen(f.metadata):
                value = getattr(self, f.name)
                changes[f.name] = change(value) if f.metadata["rows"] == "list" else _mapped(change, value)
        return replace(self, **changes)


def _is_moved(metadata: Mapping[str, Any]) -> bool:
    return bool(metadata["is_moved"])


def _has_rows(metadata: Mapping[str, Any]) -> bool:
    return metadata["rows"] is not None


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """`change` on a tensor, on each of a list or dict of tensors, or on nothing where the field is absent."""
    if value is None:
        return None
    if isinstance(value, list):
        return [change(tensor) for tensor in value]
    if isinstance(value, dict):
        return {name: change(tensor) for name, tensor in value.items()}
    return change(value)
