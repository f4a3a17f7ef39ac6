"""A module's random first weights without the module: built on the meta device, its tensors made one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import evatool.distributed.engines.random_fill  # noqa: F401  defines torch.ops.evatool

_ATEN = torch.ops.aten
_OVERWRITING = {
    _ATEN.uniform_.default,
    _ATEN.normal_.default,
    _ATEN.fill_.Scalar,
    _ATEN.fill_.Tensor,
    _ATEN.zero_.default,
    _ATEN.copy_.default,
    torch.ops.evatool.trunc_normal_.default,
}
"""Operations after which nothing is left of what a tensor held."""
_ALLOCATING = {_ATEN.empty.memory_format, _ATEN.empty_strided.default, _ATEN.empty_like.default}


@dataclass(frozen=True)
class _Place:
    """A tensor on the meta device: where its numbers would lie. Engines change the tensor itself later on."""

    storage: torch.UntypedStorage  # kept, so that no other gets its key
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Place:
        storage = tensor.untyped_storage()
        shape, stride = tuple(tensor.shape), tuple(tensor.stride())
        return cls(storage, storage.nbytes(), tensor.dtype, shape, stride, int(tensor.storage_offset()))

    @property
    def key(self) -> int:
        return int(self.storage._cdata)

    @property
    def is_all(self) -> bool:
        return math.prod(self.shape) * self.dtype.itemsize == self.num_bytes

    def within(self, memory: torch.UntypedStorage) -> Tensor:
        """The same tensor in real memory."""
        return torch.empty(0, dtype=self.dtype).set_(memory, self.offset, self.shape, self.stride)


@dataclass(frozen=True)
class _Operation:
    func: Any
    args: tuple[Any, ...]  # with places for tensors on the meta device
    kwargs: dict[str, Any]
    made: list[_Place]
    written: frozenset[int]  # keys
    overwritten: frozenset[int]  # of these, without a trace of what was there

    @property
    def is_random(self) -> bool:
        return torch.Tag.nondeterministic_seeded in self.func.tags

    def read_tensors(self) -> list[_Place]:
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, _Place)]


class MetaBuild(TorchDispatchMode):
    """Writes down what happens to tensors on the meta device within it, so that each can be made afterwards, alone.

    Use it with `torch.device("meta")` around the building of a module. The numbers are those that the same code would
    have drawn on the CPU from the generator's state at the start of the block, bit for bit. To know where in the
    stream of random numbers a tensor begins, all before it are drawn and dropped, once, at about 1e8 a second.

        written down:      1 uniform_(A)   2 normal_(B)   3 mul_(B, s)   4 zero_(C)   5 normal_(D)
        random stream:     |---- A ------|---- B -------|                           |---- D ------|
        generator states:  g1            g2                                         g5

    D asked for alone: draw and drop 1 and 2 to learn g5 (kept for the next time), set the generator to g5, run 5. B
    asked for after it: g2 is known already; run 2 and 3, the operations that wrote B since it was last overwritten
    whole. An operation that reads another tensor first has that one made as it was before the operation.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operations: list[_Operation] = []
        self._writers: dict[int, list[int]] = {}  # by key, in order
        self._random_states: dict[int, Tensor] = {}  # the generator's, before each random operation
        self._next_state = torch.get_rng_state()
        self._num_drawn = 0  # operations whose random numbers have been drawn once

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_meta]
        read = {tensor.untyped_storage()._cdata for tensor in inputs}
        # Tensors are kept as descriptions of their memory: engines put other tensors in their places later on.
        kept_args, kept_kwargs = tree_map(_without_meta, (args, kwargs)) if inputs else (args, kwargs)
        out = func(*args, **kwargs)
        made = [_Place.of(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_meta]
        new = {place.key for place in made} - read
        changed = _Place.of(args[0]) if inputs and func._schema.is_mutable else None
        if func not in _ALLOCATING and (new or changed is not None):
            # What is overwritten whole needs no earlier operation to be run again.
            overwritten = set(new)
            if changed is not None and func in _OVERWRITING and changed.is_all:
                overwritten.add(changed.key)
            written = new if changed is None else new | {changed.key}
            self._note(_Operation(func, kept_args, kept_kwargs, made, frozenset(written), frozenset(overwritten)))
        return out

    def _note(self, operation: _Operation) -> None:
        for key in operation.written:
            self._writers.setdefault(key, []).append(len(self._operations))
        self._operations.append(operation)

    def tensor(self, place: _Place) -> Tensor:
        """The tensor as the CPU would hold it, in memory of its own."""
        assert place.key in self._writers, "a parameter that nothing has filled"
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return place.within(self._memory(place, len(self._operations)))

    def _memory(self, place: _Place, before: int) -> torch.UntypedStorage:
        """What lies behind a tensor after the operations before this one."""
        history = [number for number in self._writers.get(place.key, ()) if number < before]
        clean = [at for at, number in enumerate(history) if place.key in self._operations[number].overwritten]
        memories = {place.key: torch.UntypedStorage(place.num_bytes)}
        # From the last operation that left nothing of what was there before.
        for number in history[clean[-1] if clean else 0 :]:
            operation = self._operations[number]
            for other in operation.read_tensors():
                if other.key != place.key:
                    memories[other.key] = self._memory(other, number)
            if operation.is_random:
                torch.set_rng_state(self._state_before(number))
            _run(operation, memories)
        return memories[place.key]

    def _state_before(self, number: int) -> Tensor:
        """The generator's state before a random operation; draws, into memory that is dropped, what comes before."""
        if number not in self._random_states:
            torch.set_rng_state(self._next_state)
            for drawn in range(self._num_drawn, number + 1):
                operation = self._operations[drawn]
                if operation.is_random:
                    self._random_states[drawn] = torch.get_rng_state()
                    _run(operation, {p.key: torch.UntypedStorage(p.num_bytes) for p in operation.read_tensors()})
            self._next_state, self._num_drawn = torch.get_rng_state(), number + 1
        return self._random_states[number]


def _without_meta(leaf: Any) -> Any:
    return _Place.of(leaf) if isinstance(leaf, Tensor) and leaf.is_meta else leaf


def _run(operation: _Operation, memories: dict[int, torch.UntypedStorage]) -> None:
    """Carry out an operation in real memory; that of new tensors is added."""
    args, kwargs = tree_map(
        lambda leaf: leaf.within(memories[leaf.key]) if isinstance(leaf, _Place) else leaf,
        (operation.args, operation.kwargs),
    )
    if "device" in kwargs:
        kwargs = kwargs | {"device": torch.device("cpu")}
    found = tree_leaves(operation.func(*args, **kwargs))
    for place, tensor in zip(operation.made, found, strict=True):
        assert place.stride == tensor.stride(), f"{operation.func} lays out its result in another way on the CPU"
        memories[place.key] = tensor.untyped_storage()


class InitialWeights(Mapping[str, Tensor]):
    """A module's state by name, each tensor made or read when it is asked for, and kept by nobody.

    Args:
        module: built within `build`; buffers have their values.
        sources: by name, what reads the parameters that are not random.
    """

    def __init__(self, module: nn.Module, build: MetaBuild, sources: Mapping[str, Callable[[], Tensor]]) -> None:
        state = module.state_dict(keep_vars=True)
        unknown = sorted(set(sources) - set(state))
        assert not unknown, f"sources of parameters that do not exist: {unknown[:5]}"
        self._build, self._sources = build, sources
        self._entries: dict[str, Tensor | _Place] = {
            name: _Place.of(tensor) if tensor.is_meta else tensor.detach() for name, tensor in state.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        state = self._entries[name]
        if name in self._sources:
            return self._sources[name]()
        return self._build.tensor(state) if isinstance(state, _Place) else state

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
