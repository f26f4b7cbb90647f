"""Safe unpickler: reads a pickle as data, with an allowlist of names, bounded cost, and nothing imported or run.

Harmless opcodes are executed by Python's unpickler in pure Python. The opcodes that call, set attributes, hash or
allocate memory are replaced here; `pickle_names` has the allowlist, and every other name becomes a placeholder.

Why not a faster unpickler:

- ``pickle.Unpickler``, in C, does not permit to replace opcodes, and ``find_class`` is not enough. EXT reads functions
  from the registry of ``copyreg`` past it; PUT at index 268,435,455 allocates 4 GB; BINBYTES8 allocates what it
  declares; BUILD sets attributes of the replacements of names; a deep tuple as a key ends the process, and 30,000 keys
  of one hash take half a minute. What is hashed is known only when the pickle is executed, so that a scan beforehand
  would be a second interpreter.
- ``torch.load(weights_only=True)`` allows what other libraries have registered in the process (mmengine registers the
  real ``getattr``), and calls constructors with arguments from the file (``bytearray(10**10)``).
"""

from __future__ import annotations

import pickle
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import torch

from resbackbone.checkpoints.readers.errors import CUT_OFF, UnreadableError
from resbackbone.checkpoints.readers.pickle_names import add, find, put
from resbackbone.checkpoints.readers.placeholders import Array, NumpyType, Placeholder, SafeFunction, Storage

MAX_STEPS = 1_000_000  # opcodes of a pickle; a ResNet-152 with the state of AdamW has 76 thousand

_LONG = 1 << 16  # bytes; longer ones belong to an array
_MAX_DIGITS = 100  # of a number in text
_MAX_INTEGER = 1024  # bytes

# Opcodes that the base class executes: none of them calls, hashes or sets anything.
_HARMLESS = [
    "PROTO", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1", "FLOAT", "STRING",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINSTRING", "SHORT_BINBYTES", "MARK",
    "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE", "EMPTY_LIST", "LIST", "EMPTY_SET", "EMPTY_DICT", "PUT",
    "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET", "BINPERSID", "GLOBAL", "STACK_GLOBAL", "POP",
    "POP_MARK", "DUP",
]  # fmt: skip


class SafeUnpickler(pickle._Unpickler):
    """Unpickler that builds only builtin containers, plain values and placeholders.

    Args:
        file: The file, at the first byte of the pickle.
        size: The number of bytes of the file.

    Attributes:
        storages: The type of each storage that the pickle refers to, by its key.
    """

    stack: list[Any]
    metastack: list[list[Any]]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: BinaryIO, size: int) -> None:
        super().__init__(file, encoding="latin1")
        self.storages: dict[str, torch.dtype] = {}
        self._file = file
        self._size = size
        self._budget = 2 * size + 100_000  # the bytes of an array are arguments of at most two calls

    def load(self) -> Any:
        """Read one pickle and return its content.

        Raises:
            UnreadableError: If the pickle has opcodes that checkpoints do not need, is truncated or too expensive.
            Exception: Of many kinds, if the pickle is damaged.
        """
        self.stack, self.metastack, self.proto = [], [], 0
        self.memo: dict[int, Any] = {}
        self.append = self.stack.append
        self._hashes: Counter[str] = Counter()
        read, steps = self._file.read, _STEPS
        for _ in range(MAX_STEPS):
            code = read(1)
            if code == pickle.STOP:
                return self.stack.pop()
            if code not in steps:
                raise UnreadableError(_refused_opcode(code))
            steps[code](self)
        raise UnreadableError(f"holds a pickle of more than {MAX_STEPS:,} steps; a checkpoint has far fewer")

    # Methods that the base class calls

    def read(self, count: int) -> bytes:
        """Return the next bytes, without allocating more than the file has."""
        if count > _LONG:
            self._check_left(count)
        data = self._file.read(count)
        if len(data) != count:
            raise UnreadableError(CUT_OFF)
        return data

    def readline(self) -> bytes:
        """Return the rest of a line."""
        line = self._file.readline()
        if not line.endswith(b"\n"):
            raise UnreadableError(CUT_OFF)
        return line

    def find_class(self, module: str, name: str) -> Any:
        """Return the replacement for a name."""
        return find(module, name)

    def persistent_load(self, identity: object) -> Storage | Placeholder:
        """Return the storage of a tensor or, before PyTorch 1.6, the placeholder for a class with its source."""
        match identity:
            case ("module", Placeholder() as kind, *_):
                return kind
        storage = Storage.from_id(identity)
        self.storages.setdefault(storage.key, storage.dtype)
        return storage

    def _check_left(self, count: int) -> None:
        if count > self._size - self._file.tell():
            raise UnreadableError(CUT_OFF)

    # Values

    def _frame(self) -> None:
        self.read(8)  # the length of the frame, which is not needed

    def _written_number(self) -> None:
        line = self.readline().strip()
        if len(line) > _MAX_DIGITS:
            raise UnreadableError("holds a number of too many digits")
        self.append(line == b"01" if line in (b"00", b"01") else int(line.rstrip(b"L")))

    def _integer(self) -> None:
        (count,) = struct.unpack("<i", self.read(4))
        if count < 0:
            raise UnreadableError("holds an integer of negative length")
        data = self.read(count)
        self.append(pickle.decode_long(data) if count <= _MAX_INTEGER else Placeholder("builtins.int"))

    def _bytes(self, count: int) -> None:
        if count <= _LONG:
            self.append(self.read(count))
            return
        self._check_left(count)
        data = bytearray(count)  # an array can share it without a copy
        if self._file.readinto(data) != count:  # type: ignore[attr-defined]
            raise UnreadableError(CUT_OFF)
        self.append(data)

    def _python2_text(self) -> None:
        (count,) = struct.unpack("<i", self.read(4))
        if count < 0:
            raise UnreadableError("holds text of negative length")
        self._bytes(count)
        if count <= _LONG:  # longer ones are arrays
            self.append(self.stack.pop().decode("latin1"))

    # Containers

    def _fill(self, kind: type, items: Sequence[Any], fill: Callable[[Any, Sequence[Any]], object]) -> None:
        target = self.stack[-1]
        if isinstance(target, Placeholder):
            target.content.append(items)
        elif isinstance(target, kind):
            fill(target, items)
        else:
            raise UnreadableError(f"puts what belongs into a {kind.__name__} into a {type(target).__name__}")

    def _extend(self, items: Sequence[Any]) -> None:
        self._fill(list, items, list.extend)

    def _update(self, items: Sequence[Any]) -> None:
        pairs = zip(items[::2], items[1::2], strict=True)
        self._fill(dict, items, lambda target, _: put(target, pairs, self._hashes))

    def _add(self, items: Sequence[Any]) -> None:
        self._fill(set, items, lambda target, _: add(target, items, self._hashes))

    def _new_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._update(items)

    def _new_frozenset(self) -> None:
        items = self.pop_mark()
        self.append(frozenset(add(set(), items, Counter())))

    def _pop(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        if len(items) != count:
            raise IndexError("nothing is left on the stack")
        del self.stack[-count:]
        return items

    # Calls

    def _call(self, function: object, arguments: object, more: object = None) -> None:
        if not isinstance(arguments, tuple):
            raise UnreadableError(f"calls with a {type(arguments).__name__} for arguments")
        if isinstance(function, Placeholder):
            self.append(Placeholder(function.name, function, arguments, more))
        elif isinstance(function, SafeFunction):
            self._spend(arguments)
            self.append(function.call(*arguments))
        else:
            raise UnreadableError(f"calls a {type(function).__name__}")

    def _call_marked(self) -> None:
        function, *arguments = self.pop_mark()
        self._call(function, tuple(arguments))

    def _call_named(self) -> None:
        function = find(self.readline()[:-1].decode(), self.readline()[:-1].decode())
        self._call(function, tuple(self.pop_mark()))

    def _build(self) -> None:
        (state,) = self._pop(1)
        target = self.stack[-1]
        if isinstance(target, (Array, NumpyType)):
            self._spend(state)
            target.build(state)
        elif isinstance(target, Placeholder):
            target.content.append(state)
        elif isinstance(target, OrderedDict):  # a state dict's versions of its modules; no other attribute is read
            if isinstance(state, dict) and isinstance(state.get("_metadata"), dict):
                target._metadata = state["_metadata"]  # type: ignore[attr-defined]
        elif not isinstance(target, dict):
            raise UnreadableError(f"sets attributes of a {type(target).__name__}")

    def _spend(self, arguments: object) -> None:
        """Count what a call may copy: a small pickle could have one large argument copied a million times."""
        if isinstance(arguments, tuple):
            inner = (value for argument in arguments if isinstance(argument, tuple) for value in argument)
            self._budget -= sum(len(value) for value in (*arguments, *inner) if hasattr(value, "__len__"))
        if self._budget < 0:
            raise UnreadableError("copies its content over and over; a checkpoint holds it once")


_STEPS: dict[bytes, Callable[[Any], None]] = {
    **{getattr(pickle, name): pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _HARMLESS},
    pickle.FRAME: SafeUnpickler._frame,
    pickle.INT: SafeUnpickler._written_number,
    pickle.LONG: SafeUnpickler._written_number,
    pickle.LONG4: SafeUnpickler._integer,
    pickle.BINSTRING: SafeUnpickler._python2_text,
    pickle.BINBYTES: lambda self: self._bytes(*struct.unpack("<I", self.read(4))),
    pickle.BINBYTES8: lambda self: self._bytes(*struct.unpack("<Q", self.read(8))),
    pickle.BYTEARRAY8: lambda self: self._bytes(*struct.unpack("<Q", self.read(8))),
    pickle.APPEND: lambda self: self._extend(self._pop(1)),
    pickle.APPENDS: lambda self: self._extend(self.pop_mark()),
    pickle.SETITEM: lambda self: self._update(self._pop(2)),
    pickle.SETITEMS: lambda self: self._update(self.pop_mark()),
    pickle.DICT: SafeUnpickler._new_dict,
    pickle.ADDITEMS: lambda self: self._add(self.pop_mark()),
    pickle.FROZENSET: SafeUnpickler._new_frozenset,
    pickle.REDUCE: lambda self: self._call(*self._pop(2)),
    pickle.NEWOBJ: lambda self: self._call(*self._pop(2)),
    pickle.NEWOBJ_EX: lambda self: self._call(*self._pop(3)),
    pickle.OBJ: SafeUnpickler._call_marked,
    pickle.INST: SafeUnpickler._call_named,
    pickle.BUILD: SafeUnpickler._build,
}


def _refused_opcode(code: bytes) -> str:
    if not code:
        return CUT_OFF
    name = next((name for name in pickle.__all__ if getattr(pickle, name) == code), repr(code))
    return f"holds the pickle opcode {name}, which checkpoints do not need; nothing was run"
