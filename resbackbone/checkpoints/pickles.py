"""Reads a pickle as data, by a closed list of names: nothing in it is imported or run, and what it costs is bounded.

``torch.load(weights_only=True)`` does not suffice: what it admits depends on what other libraries have registered in
the process (mmengine registers the real ``getattr``), and it calls constructors with the file's own arguments
(``bytearray(10**10)``). Here a machine of ours carries out the opcodes that checkpoints consist of, and `pickle_names`
holds all that they may name.

Source: Python's ``pickletools`` describes the opcodes.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Iterable, Sequence
from mmap import mmap
from typing import Any

import torch
from torch import Tensor

from resbackbone.checkpoints.pickle_names import (
    Array,
    Nothing,
    NumpyType,
    Storage,
    UnreadableError,
    View,
    find,
    put,
)

MAX_OBJECTS = 1_000_000
"""Steps of a pickle, and objects in its content; a ResNet-152 with the state of AdamW takes 76 thousand steps."""

MAX_DEPTH = 100
"""Mappings and lists inside one another."""

_LONG_TEXT = 1 << 16  # a longer Python 2 string is an array: it stays in the file until the array is built

_CUT_OFF = "is cut off in the middle; download or copy it again"


class Machine:
    """Carries out a pickle's opcodes on stand-ins.

    Args:
        data: What the pickle lies in.
        start: Its first byte.

    Attributes:
        position: The byte after what was read.
        storages: The type of each storage that was referred to, by its key.
    """

    def __init__(self, data: bytes | mmap, start: int = 0) -> None:
        self.position = start
        self.storages: dict[str, torch.dtype] = {}
        self._data = data
        self._bytes = memoryview(data)
        self._budget = 4 * len(data) + MAX_OBJECTS  # an array's numbers pass through at most two calls

    def run(self) -> Any:
        """Read one pickle; return its object, made of builtin containers, plain values and stand-ins.

        Raises:
            UnreadableError: If the pickle names anything but what checkpoints hold, is cut off or costs too much.
            Exception: Of many kinds, if the pickle is damaged.
        """
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        for _ in range(MAX_OBJECTS):
            code = self._data[self.position : self.position + 1]
            self.position += 1
            if code == pickle.STOP:
                return self._stack.pop()
            if code not in _STEPS:
                raise UnreadableError(_refused_opcode(code))
            _STEPS[code](self)
        raise UnreadableError(f"holds a pickle of more than {MAX_OBJECTS:,} steps; a checkpoint has far fewer")

    # Input

    def _take(self, count: int) -> memoryview:
        piece = self._bytes[self.position : self.position + count]
        if len(piece) != count:
            raise UnreadableError(_CUT_OFF)
        self.position += count
        return piece

    def _skip(self, count: int) -> None:
        self._take(count)

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _counted(self, layout: str) -> memoryview:
        return self._take(self._number(layout))

    def _line(self) -> bytes:
        end = self._data.find(b"\n", self.position)
        if end < 0:
            raise UnreadableError(_CUT_OFF)
        return bytes(self._take(end + 1 - self.position)[:-1])

    # Values

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _written_number(self) -> None:
        line = self._line()[:32].rstrip(b"L")
        self._push(line == b"01" if line in (b"00", b"01") else int(line))

    def _index(self) -> int:
        return int(self._line()[:32])

    # Containers

    def _mark(self) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _pop(self, count: int) -> tuple[Any, ...]:
        return tuple(reversed([self._stack.pop() for _ in range(count)]))

    def _extend(self, items: Iterable[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise UnreadableError(f"appends to a {type(target).__name__}")
        target.extend(items)

    def _update(self, items: Sequence[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict:
            raise UnreadableError(f"sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            put(target, key, value)

    def _new_dict(self) -> None:
        items = self._since_mark()
        self._push({})
        self._update(items)

    def _remember(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    # Names

    def _named(self) -> object:
        return find(self._line().decode(), self._line().decode())

    def _call(self, function: object, arguments: object) -> None:
        if not isinstance(arguments, tuple):
            raise UnreadableError(f"calls with a {type(arguments).__name__} for arguments")
        if not callable(function):
            raise UnreadableError(f"calls a {type(function).__name__}")
        self._spend(arguments)
        self._push(function(*arguments))  # one of ours: nothing but `find` puts functions on the stack

    def _build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, (Array, NumpyType, Nothing)):
            self._spend(state)
            target.build(state)
        elif type(target) is not dict:  # an OrderedDict's attributes, such as PyTorch's `_metadata`, are let go
            raise UnreadableError(f"sets attributes of a {type(target).__name__}")

    def _refer(self) -> None:
        storage = Storage.from_id(self._stack.pop())
        self.storages.setdefault(storage.key, storage.dtype)
        self._push(storage)

    def _spend(self, arguments: object) -> None:
        """Count what a call may copy; a small pickle could have one large argument copied a million times."""
        if isinstance(arguments, tuple):
            self._budget -= sum(len(value) for value in arguments if hasattr(value, "__len__"))
        if self._budget < 0:
            raise UnreadableError("copies its content over and over; a checkpoint holds it once")


def _text(raw: memoryview) -> str:
    return str(raw, "utf-8", "surrogatepass")


def _python2_text(raw: memoryview) -> str | memoryview:
    return raw if len(raw) > _LONG_TEXT else str(raw, "latin1")


def _integer(raw: memoryview) -> int:
    return int.from_bytes(raw, "little", signed=True)


def _refused_opcode(code: bytes) -> str:
    if not code:
        return _CUT_OFF
    name = next((name for name in pickle.__all__ if getattr(pickle, name) == code), repr(code))
    return f"holds the pickle opcode {name}, which checkpoints do not need; nothing was run"


_STEPS: dict[bytes, Callable[[Machine], None]] = {
    pickle.PROTO: lambda m: m._skip(1),
    pickle.FRAME: lambda m: m._skip(8),
    # Values; bytes stay in the file until an array is built of them
    pickle.NONE: lambda m: m._push(None),
    pickle.NEWTRUE: lambda m: m._push(True),
    pickle.NEWFALSE: lambda m: m._push(False),
    pickle.BININT: lambda m: m._push(m._number("<i")),
    pickle.BININT1: lambda m: m._push(m._number("<B")),
    pickle.BININT2: lambda m: m._push(m._number("<H")),
    pickle.BINFLOAT: lambda m: m._push(m._number(">d")),
    pickle.LONG1: lambda m: m._push(_integer(m._counted("<B"))),
    pickle.SHORT_BINUNICODE: lambda m: m._push(_text(m._counted("<B"))),
    pickle.BINUNICODE: lambda m: m._push(_text(m._counted("<I"))),
    pickle.BINUNICODE8: lambda m: m._push(_text(m._counted("<Q"))),
    pickle.SHORT_BINSTRING: lambda m: m._push(_python2_text(m._counted("<B"))),
    pickle.BINSTRING: lambda m: m._push(_python2_text(m._counted("<I"))),
    pickle.SHORT_BINBYTES: lambda m: m._push(m._counted("<B")),
    pickle.BINBYTES: lambda m: m._push(m._counted("<I")),
    pickle.BINBYTES8: lambda m: m._push(m._counted("<Q")),
    pickle.BYTEARRAY8: lambda m: m._push(m._counted("<Q")),
    # Values written as lines of text, in the oldest protocol
    pickle.INT: Machine._written_number,
    pickle.LONG: Machine._written_number,
    pickle.FLOAT: lambda m: m._push(float(m._line())),
    pickle.STRING: lambda m: m._push(str(m._line()[1:-1], "unicode_escape")),
    pickle.UNICODE: lambda m: m._push(str(m._line(), "raw_unicode_escape")),
    # Containers. Sets become lists: to hash members of the file's choice could take any time
    pickle.MARK: Machine._mark,
    pickle.EMPTY_TUPLE: lambda m: m._push(()),
    pickle.TUPLE1: lambda m: m._push(m._pop(1)),
    pickle.TUPLE2: lambda m: m._push(m._pop(2)),
    pickle.TUPLE3: lambda m: m._push(m._pop(3)),
    pickle.TUPLE: lambda m: m._push(tuple(m._since_mark())),
    pickle.EMPTY_LIST: lambda m: m._push([]),
    pickle.EMPTY_SET: lambda m: m._push([]),
    pickle.LIST: lambda m: m._push(m._since_mark()),
    pickle.FROZENSET: lambda m: m._push(m._since_mark()),
    pickle.APPEND: lambda m: m._extend(m._pop(1)),
    pickle.APPENDS: lambda m: m._extend(m._since_mark()),
    pickle.ADDITEMS: lambda m: m._extend(m._since_mark()),
    pickle.EMPTY_DICT: lambda m: m._push({}),
    pickle.DICT: Machine._new_dict,
    pickle.SETITEM: lambda m: m._update(m._pop(2)),
    pickle.SETITEMS: lambda m: m._update(m._since_mark()),
    # References to what came before
    pickle.PUT: lambda m: m._remember(m._index()),
    pickle.BINPUT: lambda m: m._remember(m._number("<B")),
    pickle.LONG_BINPUT: lambda m: m._remember(m._number("<I")),
    pickle.MEMOIZE: lambda m: m._remember(len(m._memo)),
    pickle.GET: lambda m: m._push(m._memo[m._index()]),
    pickle.BINGET: lambda m: m._push(m._memo[m._number("<B")]),
    pickle.LONG_BINGET: lambda m: m._push(m._memo[m._number("<I")]),
    pickle.BINPERSID: Machine._refer,
    # Names, and calls of what stands for them
    pickle.GLOBAL: lambda m: m._push(m._named()),
    pickle.STACK_GLOBAL: lambda m: m._push(find(*m._pop(2))),
    pickle.INST: lambda m: m._call(m._named(), tuple(m._since_mark())),
    pickle.REDUCE: lambda m: m._call(*m._pop(2)),
    pickle.NEWOBJ: lambda m: m._call(*m._pop(2)),
    pickle.BUILD: Machine._build,
}


def plain(content: object, tensor_of: Callable[[View], Tensor]) -> Any:
    """Return a machine's object with tensors in place of stand-ins, as a tree.

    Args:
        content: The object. What it refers to twice is there twice, but tensors are shared.
        tensor_of: Makes a tensor of a view.

    Raises:
        UnreadableError: If it is not a tree of reasonable depth and size, or holds something that is no value.
    """
    made: dict[int, Any] = {}
    left = MAX_OBJECTS

    def once(value: object) -> Any:
        if id(value) not in made:
            made[id(value)] = _leaf(value, tensor_of)
        return made[id(value)]

    def walk(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if depth > MAX_DEPTH:
            raise UnreadableError(
                f"is nested more than {MAX_DEPTH} deep; a checkpoint is a mapping of names to tensors"
            )
        if left < 0:
            raise UnreadableError(f"holds more than {MAX_OBJECTS:,} objects; a checkpoint holds far fewer")
        if type(value) is dict:
            return {key: walk(item, depth + 1) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(walk(item, depth + 1) for item in value)
        return once(value)

    return walk(content, 0)


def _leaf(value: object, tensor_of: Callable[[View], Tensor]) -> Any:
    match value:
        case None | bool() | int() | float() | str() | bytes() | torch.dtype():
            return value
        case memoryview():
            return bytes(value)
        case View():
            return tensor_of(value)
        case Array(tensor=Tensor() as tensor):
            return tensor
        case Nothing():
            return None
        case _:
            raise UnreadableError(f"holds {type(value).__name__} where a tensor or a plain value should be")
