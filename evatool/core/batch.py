"""The few shapes that sibling packages agree on. No torch at run time: the CLI may import this."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

# B batch, S input side in pixels, N patches, L text tokens

LossDict = dict[str, "Tensor"]
"""Scalar losses by name with `"loss"` (the one to minimise, with gradient) among them; the others are only logged."""


@dataclass
class Batch:
    """One rank's samples of one optimiser step, on the CPU until the engine moves them."""

    image: Tensor  # (B, 3, S, S) uint8 RGB; normalised on the device
    keys: list[str]  # sample keys, for error messages
    tokens: Tensor | None = None  # (B, L) int64, zero-padded after the end-of-text token, which is the largest id
    caption_id: Tensor | None = None  # (B,) int64; equal ids if and only if the captions are equal
    mask: Tensor | None = None  # (B, N) bool, True where the student does not see the patch
    teacher_image: Tensor | None = None  # (B, 3, T, T) uint8, the same crop at the teacher's size
    teacher_images: list[Tensor] | None = None  # the same at the sizes of further teachers
    position: int = 0  # global samples consumed once this batch is used; the loader's whole state
    text_lengths: Tensor | None = None  # (B,) int64, always on the CPU: tokens up to the end-of-text token
    extras: dict[str, Tensor] | None = None  # name -> (B, ...) float16 or float32, arrays stored beside the samples
    valid: Tensor | None = None  # (B,) bool, always on the CPU: False for what only fills up the last batch of a pass
    stored: dict[str, Tensor] | None = None  # teacher -> (B, ...) float16, its stored features; absent where any is not
    store_rows: Tensor | None = None  # (B, 4) int64, always on the CPU: source, shard, number in the shard, view

    def __post_init__(self) -> None:
        # Found out while the tokens are on the CPU: reading them from a GPU would make the CPU wait for it.
        if self.tokens is not None and self.text_lengths is None:
            self.text_lengths = self.tokens.argmax(dim=-1).cpu() + 1

    def to(self, device: Any) -> Batch:
        """The same batch with its tensors on `device`."""
        there = lambda t: t.to(device, non_blocking=True)  # noqa: E731
        move = lambda t: None if t is None else there(t)  # noqa: E731
        return replace(
            self,
            image=there(self.image),
            tokens=move(self.tokens),
            caption_id=move(self.caption_id),
            mask=move(self.mask),
            teacher_image=move(self.teacher_image),
            teacher_images=None if self.teacher_images is None else [there(view) for view in self.teacher_images],
            extras=None if self.extras is None else {name: there(t) for name, t in self.extras.items()},
            stored=None if self.stored is None else {name: there(t) for name, t in self.stored.items()},
        )

    def pin_memory(self) -> Batch:
        """The same batch in pinned memory, from which `to` a GPU does not wait; a DataLoader calls it."""
        pin = lambda t: None if t is None else t.pin_memory()  # noqa: E731
        return replace(
            self,
            image=self.image.pin_memory(),
            tokens=pin(self.tokens),
            caption_id=pin(self.caption_id),
            mask=pin(self.mask),
            teacher_image=pin(self.teacher_image),
            teacher_images=None if self.teacher_images is None else [view.pin_memory() for view in self.teacher_images],
            extras=None if self.extras is None else {name: t.pin_memory() for name, t in self.extras.items()},
            stored=None if self.stored is None else {name: t.pin_memory() for name, t in self.stored.items()},
        )

    def rows(self, rows: slice) -> Batch:
        """Some of the samples; the position stays the whole batch's."""
        cut = lambda t: None if t is None else t[rows]  # noqa: E731
        return replace(
            self,
            image=self.image[rows],
            keys=self.keys[rows],
            tokens=cut(self.tokens),
            caption_id=cut(self.caption_id),
            mask=cut(self.mask),
            teacher_image=cut(self.teacher_image),
            teacher_images=None if self.teacher_images is None else [view[rows] for view in self.teacher_images],
            text_lengths=cut(self.text_lengths),
            extras=None if self.extras is None else {name: t[rows] for name, t in self.extras.items()},
            valid=cut(self.valid),
            stored=None if self.stored is None else {name: t[rows] for name, t in self.stored.items()},
            store_rows=cut(self.store_rows),
        )


class Loader(Protocol):
    """What the trainer needs of a data loader: batches without end, from a position that is one integer."""

    position: int

    def __iter__(self) -> Any: ...


@dataclass
class ParamGroup:
    """Parameters that share a learning rate and a weight decay; made by `optim`, stepped by an engine."""

    name: str  # tower/layer/decay, for instance "visual/layer_03/decay"
    tower: str  # "visual", "text" or "other"
    layer: int | None  # 0 the embeddings, i + 1 block i, depth + 1 the head; None where a tower has no layer decay
    lr: float  # the tower's peak learning rate
    lr_scale: float  # factor of layer decay on it
    weight_decay: float
    params: list[Tensor]
    param_names: list[str]  # as in the objective's `named_parameters()`, in the order of `params`


@dataclass
class Result:
    """What a stage hands back to the command line (and `--json` prints)."""

    stage: str
    run_dir: Path
    outputs: dict[str, Path] = field(default_factory=dict)  # name -> what was made
    metrics: dict[str, float | int | str] = field(default_factory=dict)
    next_command: str | None = None
    table: list[list[str]] = field(default_factory=list)  # header row first; shown in the terminal
