"""Pickles read as data, opcode by opcode, within a budget of memory: nothing is imported, called or allocated unseen.

Why not Python's own reader: it takes 4.6 GB for nine bytes that name a huge memo slot, hashes a tuple that holds the
one before twice in 2 ** depth steps, and lets a pickle set attributes of what `find_class` returned. Here every length
is checked against the bytes that are there, and every value is paid for before it is made.
CPython's Lib/pickletools.py describes the opcodes of protocols 0 to 5.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from typing import Any

from evatool.core.errors import CheckpointError

FREE_BYTES = 48 * 2**20
"""Memory that the values of a pickle of any length may take; for each byte of the pickle there is one more."""

MAX_KEY_BITS = 64

_MARK = object()
_STEP, _SMALL, _VALUE, _CONTAINER, _CALL = 16, 8, 72, 88, 400  # bytes: an opcode, a place in a list, a number, ...

PickleError = pickle.UnpicklingError


class Budget:
    """Bytes that may still be taken. `spend` raises CheckpointError where they are used up."""

    def __init__(self, allowed: int, where: str) -> None:
        self.allowed, self.left, self.where = allowed, allowed, where

    def spend(self, count: int) -> None:
        """Take `count` bytes."""
        self.left -= count
        if self.left < 0:
            raise CheckpointError(
                f"the pickle's objects would take more than {self.allowed >> 20} MiB of memory",
                where=self.where,
                expected="tensors with a few plain values beside them",
                fix="save the state dict alone, or convert the file to safetensors where it was made",
            )


class PickleReader:
    """The objects of one pickle after another.

    Args:
        data: the bytes; a pickle that goes on behind them is refused.
        find_class: (module, name) to what stands for that class. Only what `can_call` accepts is ever called.
        persistent_load: a persistent id to its object.
        record: the class of inert instances, which take any state.
    """

    def __init__(
        self,
        data: bytes,
        where: str,
        *,
        find_class: Callable[[str, str], Any],
        persistent_load: Callable[[Any], Any],
        can_call: Callable[[Any], bool],
        record: type,
    ) -> None:
        self.data, self.at = data, 0
        self.budget = Budget(FREE_BYTES + len(data), where)
        self._find_class, self._persistent_load, self._can_call = find_class, persistent_load, can_call
        self._record = record
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The next object. Raises: PickleError for damage, CheckpointError where it would take too much memory."""
        self._stack, self._memo = [], {}
        data, steps, spend = self.data, _STEPS, self.budget.spend
        while self.at < len(data):
            code = data[self.at]
            self.at += 1
            if code == _STOP:
                return self._pop()
            step = steps.get(code)
            if step is None:
                raise PickleError(f"opcode {bytes([code])!r} is not read")
            spend(_STEP)
            step(self)
        raise PickleError("the pickle ends early")

    # ---------------------------------------------------------------------------------------------- bytes and stack

    def _take(self, count: int) -> bytes:
        if count < 0 or count > len(self.data) - self.at:
            raise PickleError(f"{count} bytes are announced, and {len(self.data) - self.at} are left")
        self.at += count
        return self.data[self.at - count : self.at]

    def _number(self, size: int, *, signed: bool = False) -> int:
        return int.from_bytes(self._take(size), "little", signed=signed)

    def _line(self) -> str:
        return self._raw_line().decode("utf-8")

    def _raw_line(self) -> bytes:
        end = self.data.find(b"\n", self.at, self.at + 4096)
        if end < 0:
            raise PickleError("a line of more than 4096 bytes")
        return self._take(end + 1 - self.at)[:-1]

    def _push(self, value: Any, cost: int = _VALUE) -> None:
        self.budget.spend(cost)
        self._stack.append(value)

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise PickleError("a value is missing")
        return self._stack.pop()

    def _since_mark(self) -> list[Any]:
        for at in range(len(self._stack) - 1, -1, -1):
            if self._stack[at] is _MARK:
                values = self._stack[at + 1 :]
                self.budget.spend(_SMALL * len(values))
                del self._stack[at:]
                return values
        raise PickleError("a mark is missing")

    def _top(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise PickleError("a value is missing")
        return self._stack[-1]

    # ---------------------------------------------------------------------------------------------- values

    def _bytes(self, size_bytes: int) -> None:
        length = self._number(size_bytes)
        self._push(self._take(length), _VALUE + length)

    def _text(self, size_bytes: int) -> None:
        length = self._number(size_bytes)
        text = self._take(length).decode("utf-8", "replace")
        self._push(text, _VALUE + (length if text.isascii() else 4 * len(text)))

    def _latin_text(self, size_bytes: int) -> None:
        length = self._number(size_bytes)
        self._push(self._take(length).decode("latin-1"), _VALUE + length)

    def _integer(self, size_bytes: int) -> None:
        length = self._number(size_bytes)
        if length > 64:
            raise PickleError(f"a whole number of {length} bytes")
        self._push(self._number(length, signed=True))

    def _text_integer(self) -> None:
        line = self._line().removesuffix("L")
        if len(line) > 100:
            raise PickleError(f"a whole number of {len(line)} digits")
        self._push({"00": False, "01": True}.get(line, int(line)))

    def _quoted(self) -> None:
        line = self._raw_line()
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
            raise PickleError("a text without quotes")
        self._push(line[1:-1].decode("unicode_escape"), _VALUE + 4 * len(line))

    def _unicode_line(self) -> None:
        line = self._raw_line()
        self._push(line.decode("raw_unicode_escape"), _VALUE + 4 * len(line))

    def _tuple(self, count: int) -> None:
        self._push(tuple(reversed([self._pop() for _ in range(count)])), _VALUE)

    # ---------------------------------------------------------------------------------------------- containers

    def _set_items(self, target: Any, items: list[Any]) -> None:
        if not isinstance(target, dict | self._record) or len(items) % 2:
            raise PickleError(f"items of {type(target).__name__}")
        self.budget.spend(60 * len(items))
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[checked_key(key)] = value  # type: ignore[index]

    def _append_items(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, list):
            self.budget.spend(2 * _SMALL * len(items))
            target.extend(items)
        elif isinstance(target, set):
            self.budget.spend(60 * len(items))
            target.update(map(checked_key, items))
        elif not isinstance(target, self._record):
            raise PickleError(f"items of {type(target).__name__}")

    def _pop_mark_then(self, use: Callable[[Any, list[Any]], None]) -> None:
        items = self._since_mark()
        use(self._top(), items)

    def _one_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set_items(self._top(), [key, value])

    def _append(self) -> None:
        value = self._pop()
        self._append_items(self._top(), [value])

    def _dictionary(self) -> None:
        items = self._since_mark()
        self._push({}, _CONTAINER)
        self._set_items(self._top(), items)

    def _set(self, kind: type) -> None:
        items = self._since_mark()
        self._push(kind(map(checked_key, items)), _CONTAINER + 60 * len(items))

    # ---------------------------------------------------------------------------------------------- objects

    def _global(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleError("a class without a name")
        self._push(self._find_class(module, name), _CALL)

    def _call(self, function: Any, arguments: Any, keywords: Any = None) -> None:
        if not isinstance(arguments, tuple) or not isinstance(keywords, dict | None):
            raise PickleError("a call without arguments")
        if isinstance(function, type) and issubclass(function, self._record):
            self._push(function(*arguments), _CALL + _SMALL * len(arguments))
        elif self._can_call(function) and not keywords:
            self._push(function(self.budget, *arguments), _CALL)
        else:
            raise PickleError(f"a call of {type(function).__name__}")

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        self._call(function, arguments)

    def _new_object(self, *, has_keywords: bool) -> None:
        keywords = self._pop() if has_keywords else None
        arguments, function = self._pop(), self._pop()
        self._call(function, arguments, keywords)

    def _object(self) -> None:
        function, *arguments = self._since_mark() or [None]
        self._call(function, tuple(arguments))

    def _instance(self) -> None:
        module, name = self._line(), self._line()
        self._call(self._find_class(module, name), tuple(self._since_mark()))

    def _build(self) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, self._record):
            target.__setstate__(state)  # type: ignore[attr-defined]
        elif not isinstance(target, dict):  # attributes of an OrderedDict (a state dict's `_metadata`) are not kept
            raise PickleError(f"a state for {type(target).__name__}")

    def _persistent(self, pid: Any) -> None:
        self._push(self._persistent_load(pid), _CALL)

    # ---------------------------------------------------------------------------------------------- memo

    def _put(self, slot: int) -> None:
        self.budget.spend(100)
        self._memo[slot] = self._top()

    def _get(self, slot: int) -> None:
        if slot not in self._memo:
            raise PickleError(f"memo slot {slot} is empty")
        self._stack.append(self._memo[slot])


def checked_key(key: Any) -> Any:
    """A key whose hash is quick to compute and hard to make collide. Raises: PickleError for another."""
    if isinstance(key, tuple):
        if len(key) > 64 or any(isinstance(part, tuple | frozenset) for part in key):
            raise PickleError("a nested tuple as key")
        for part in key:
            checked_key(part)
    elif isinstance(key, frozenset) or (isinstance(key, int) and key.bit_length() > MAX_KEY_BITS):
        raise PickleError(f"a key of {type(key).__name__}")
    return key


_STOP = ord(".")
_Step = Callable[[PickleReader], Any]


# The opcodes. Extension codes and out-of-band buffers are not among them: torch writes none.
_CODES: dict[bytes, _Step] = {
    b"\x80": lambda r: r._take(1),
    b"\x95": lambda r: r._take(8),  # a frame: its length says nothing that the opcodes do not
    b"(": lambda r: r._stack.append(_MARK),
    b"0": lambda r: r._stack.pop() if r._stack else r._pop(),
    b"1": lambda r: r._since_mark(),
    b"2": lambda r: r._stack.append(r._top()),
    b"N": lambda r: r._stack.append(None),
    b"\x88": lambda r: r._stack.append(True),
    b"\x89": lambda r: r._stack.append(False),
    b"K": lambda r: r._stack.append(r._number(1)),
    b"M": lambda r: r._push(r._number(2)),
    b"J": lambda r: r._push(r._number(4, signed=True)),
    b"I": lambda r: r._text_integer(),
    b"L": lambda r: r._text_integer(),
    b"\x8a": lambda r: r._integer(1),
    b"\x8b": lambda r: r._integer(4),
    b"F": lambda r: r._push(float(r._line())),
    b"G": lambda r: r._push(struct.unpack(">d", r._take(8))[0]),
    b"S": lambda r: r._quoted(),
    b"V": lambda r: r._unicode_line(),
    b"U": lambda r: r._latin_text(1),
    b"T": lambda r: r._latin_text(4),
    b"C": lambda r: r._bytes(1),
    b"B": lambda r: r._bytes(4),
    b"\x8e": lambda r: r._bytes(8),
    b"\x96": lambda r: r._bytes(8),
    b"\x8c": lambda r: r._text(1),
    b"X": lambda r: r._text(4),
    b"\x8d": lambda r: r._text(8),
    b"]": lambda r: r._push([], _CONTAINER),
    b"}": lambda r: r._push({}, _CONTAINER),
    b"\x8f": lambda r: r._push(set(), 3 * _CONTAINER),
    b")": lambda r: r._stack.append(()),
    b"t": lambda r: r._push(tuple(r._since_mark())),
    b"\x85": lambda r: r._tuple(1),
    b"\x86": lambda r: r._tuple(2),
    b"\x87": lambda r: r._tuple(3),
    b"l": lambda r: r._push(r._since_mark(), _CONTAINER),
    b"d": lambda r: r._dictionary(),
    b"\x91": lambda r: r._set(frozenset),
    b"a": lambda r: r._append(),
    b"e": lambda r: r._pop_mark_then(r._append_items),
    b"\x90": lambda r: r._pop_mark_then(r._append_items),
    b"s": lambda r: r._one_item(),
    b"u": lambda r: r._pop_mark_then(r._set_items),
    b"c": lambda r: r._global(r._line(), r._line()),
    b"\x93": lambda r: r._global(*reversed((r._pop(), r._pop()))),
    b"R": lambda r: r._reduce(),
    b"\x81": lambda r: r._new_object(has_keywords=False),
    b"\x92": lambda r: r._new_object(has_keywords=True),
    b"o": lambda r: r._object(),
    b"i": lambda r: r._instance(),
    b"b": lambda r: r._build(),
    b"P": lambda r: r._persistent(r._line()),
    b"Q": lambda r: r._persistent(r._pop()),
    b"q": lambda r: r._put(r._number(1)),
    b"r": lambda r: r._put(r._number(4)),
    b"p": lambda r: r._put(int(r._line())),
    b"\x94": lambda r: r._put(len(r._memo)),
    b"h": lambda r: r._get(r._number(1)),
    b"j": lambda r: r._get(r._number(4)),
    b"g": lambda r: r._get(int(r._line())),
}
_STEPS = {code[0]: step for code, step in _CODES.items()}
