"""The names that pickles of checkpoints hold, and what stands for each: descriptions, and inert functions of ours."""

from __future__ import annotations

import math
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

_MAX_DIMENSIONS = 32
_MAX_KEY = 64  # objects in a key that is a tuple
_MAX_COLLISIONS = 100  # keys of one mapping that have the same hash

ADVICE = (
    "nothing was run. If you trust its author, load it in the program that wrote it, and save the weights alone: "
    "torch.save(model.state_dict(), 'weights.pth')"
)


_Mapping = TypeVar("_Mapping", bound=dict[Any, Any])


class UnreadableError(ValueError):
    """What is wrong with a file, worded to follow its name: "is empty; download it again"."""


class Inert:
    """Stands for an object, class or function that is not loaded: nothing is imported, called or set.

    Attributes:
        name: The full name of its class, or its own; printable, and shortened.
        content: What the pickle passed to it; empty once the file has been read.
    """

    __slots__ = ("content", "name")

    def __init__(self, name: str, *content: object) -> None:
        self.name = printable(name)
        self.content = list(content)

    def __repr__(self) -> str:
        """Say what it was."""
        return f"<{self.name}, not loaded>"


@dataclass(frozen=True, eq=False, slots=True)
class Function:
    """Stands for a function or class that a pickle may call."""

    name: str
    call: Callable[..., object]


@dataclass(frozen=True, eq=False, slots=True)
class Storage:
    """Numbers that lie elsewhere in the file.

    Attributes:
        key: What the file calls them.
        dtype: Their type.
        start: The first of them that belongs to this storage.
        count: How many belong to it.
    """

    key: str
    dtype: torch.dtype
    start: int
    count: int

    @classmethod
    def from_id(cls, identity: object) -> Storage:
        """Read a persistent id: ``("storage", type, key, device, count)``, before PyTorch 0.4 with a view of it."""
        match identity:
            case ("storage", torch.dtype() as dtype, str(key), _, int(count)):
                start = 0
            case ("storage", torch.dtype() as dtype, str(key), _, int(count), None):
                start = 0
            case ("storage", torch.dtype() as dtype, str(key), _, int(), (_, int(start), int(count))):
                pass
            case ("storage", Inert(name=name), *_):
                raise UnreadableError(f"holds tensors of the unknown type {name!r}; {ADVICE}")
            case _:
                raise UnreadableError("refers to something outside that is no storage of numbers")
        _check_sizes("a storage", (start, count))
        return cls(key, dtype, start, count)


@dataclass(frozen=True, eq=False, slots=True)
class View:
    """A tensor over a storage: ``offset``, ``size`` and ``stride`` are counted in elements of ``dtype``."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        storage: object = self.storage
        if isinstance(storage, Inert):
            raise UnreadableError(f"holds a tensor whose numbers are made by {storage.name!r}; {ADVICE}")
        if not isinstance(storage, Storage) or not isinstance(self.dtype, torch.dtype):
            raise UnreadableError("holds a tensor without a storage of numbers")
        _check_sizes("a tensor", (self.offset, *self.size, *self.stride))
        count = math.prod(self.size)
        last = self.offset + sum((length - 1) * step for length, step in zip(self.size, self.stride, strict=True))
        available = self.storage.count * self.storage.dtype.itemsize // self.dtype.itemsize
        if count and max(count, last + 1) > available:
            raise UnreadableError(
                f"holds a tensor of shape {self.size} and stride {self.stride} over a storage of {available} elements"
            )


class NumpyType:
    """Stands for a ``numpy.dtype`` of numbers."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype

    def build(self, state: object) -> None:
        """Take on the byte order from what numpy pickles: version, order, and five fields for types of other kinds."""
        match state:
            case (int(), "<" | ">" | "=" | "|" as order, None, None, None, *_):
                self.dtype = self.dtype.newbyteorder(order)
            case _:
                raise UnreadableError("holds an array with fields; only arrays of numbers are read")


class Array(Inert):
    """Stands for a ``numpy.ndarray``: empty until its numbers come, and inert if they are none."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor | None = None) -> None:
        super().__init__("numpy.ndarray")
        self.tensor = tensor

    def build(self, state: object) -> None:
        """Take on the numbers from what numpy pickles: version, shape, type, whether Fortran's order, bytes."""
        match state:
            case (int(), tuple(shape), NumpyType() as kind, bool() | int() as fortran, data):
                self.tensor = _array(data, kind, shape, "F" if fortran else "C")
            case (int(), tuple(), Inert(), bool() | int(), data):
                self.content.append(data)
            case _:
                raise UnreadableError("holds a damaged array")


def printable(text: str, length: int = 100) -> str:
    """Return a text of the file's as it can be shown in a line: shortened, and without control characters."""
    text = text if len(text) <= length else f"{text[: length - 3]}..."
    return text if text.isprintable() else ascii(text)[1:-1]


def _check_sizes(owner: str, sizes: tuple[object, ...]) -> None:
    for size in sizes:
        if not isinstance(size, int) or not 0 <= size < 2**63:
            raise UnreadableError(f"holds {owner} of an impossible size")
    if len(sizes) > 2 * _MAX_DIMENSIONS + 1:
        raise UnreadableError(f"holds {owner} of an impossible size")


def _bytes(data: object) -> bytes | bytearray:
    """Return the bytes of an array, which Python 2 wrote as a string."""
    if isinstance(data, str):
        return data.encode("latin1")
    if isinstance(data, (bytes, bytearray)):
        return data
    raise UnreadableError(f"holds an array whose numbers are a {type(data).__name__}; only bytes are read")


def _array(data: object, kind: NumpyType, shape: object, order: object = "C") -> Tensor:
    content = _bytes(data)
    if not isinstance(shape, tuple) or order not in ("C", "F"):
        raise UnreadableError("holds a damaged array")
    _check_sizes("an array", shape)
    if math.prod(shape) * kind.dtype.itemsize != len(content):
        raise UnreadableError(f"holds an array of shape {shape} and type {kind.dtype} in {len(content)} bytes")
    values = np.frombuffer(content, kind.dtype).reshape(shape, order=order)
    # Long ones are in memory of their own, which the tensor takes over.
    copied = np.array if isinstance(content, bytes) else np.asarray
    return torch.from_numpy(copied(values, dtype=kind.dtype.newbyteorder("="), order="C"))


def _numpy_type(code: object, *_: object) -> NumpyType | Inert:
    if isinstance(code, str) and re.fullmatch(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16)", code):
        return NumpyType(np.dtype(code))
    return Inert("numpy.dtype", code)


def _empty_array(kind: object, shape: object, code: object) -> Inert:
    if not isinstance(kind, Inert):
        raise UnreadableError("holds a damaged array")
    return Array() if kind.name == "numpy.ndarray" else Inert(kind.name)


def _whole_array(data: object, kind: object, shape: object, order: object) -> Inert:
    return Array(_array(data, kind, shape, order)) if isinstance(kind, NumpyType) else Inert("numpy.ndarray", data)


def _scalar(kind: object, data: object = b"") -> bool | int | float | complex | Inert:
    if not isinstance(kind, NumpyType):
        return Inert("numpy.generic", data)
    value: bool | int | float | complex = _array(data, kind, ()).item()
    return value


def _view(
    storage: Any, offset: Any, size: Any, stride: Any, grad: object = False, hooks: object = None, bits: object = None
) -> View:
    return _typed_view(storage, offset, size, stride, grad, hooks, getattr(storage, "dtype", None), bits)


def _typed_view(
    storage: Any, offset: Any, size: Any, stride: Any, grad: object, hooks: object, dtype: Any, bits: object = None
) -> View:
    if bits:
        raise UnreadableError("holds a tensor that is conjugated or negated; only plain tensors are read")
    return View(storage, dtype, offset, tuple(size), tuple(stride))


def _parameter(data: object, *_: object) -> View:
    if not isinstance(data, View):
        raise UnreadableError("holds a parameter that is no tensor")
    return data


def _tensor_of_a_class(function: object, kind: object, arguments: object, state: object) -> object:
    """Stand for how tensors are pickled that have attributes or a class of their own: the tensor alone is read."""
    if not isinstance(function, Function) or not isinstance(arguments, tuple):
        return Inert(kind.name if isinstance(kind, Inert) else "torch.Tensor", function, arguments)
    return function.call(*arguments)


def _size(sizes: object = ()) -> torch.Size:
    if not isinstance(sizes, (list, tuple)):
        raise UnreadableError("holds a size that is no sequence of integers")
    _check_sizes("a tensor", tuple(sizes))
    return torch.Size(sizes)


def _device(kind: object, index: object = None) -> torch.device | Inert:
    if not isinstance(kind, str) or not re.fullmatch(r"[a-z]{1,20}(:\d{1,3})?", kind):
        raise UnreadableError("holds a device without a name")
    try:
        return torch.device(kind) if index is None else torch.device(kind, index)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):  # of a kind that this PyTorch does not know
        return Inert("torch.device")


def _encode(text: str, codec: str) -> bytes:
    """Stand for ``_codecs.encode``, the way in which bytes are written for Python 2."""
    if codec not in ("latin1", "latin-1"):
        raise UnreadableError("holds bytes that are not written as latin1")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


def _bytearray(data: object = b"", *_: object) -> bytes | Inert:
    """Stand for ``bytearray``, which makes any number of bytes if it is given a number."""
    return bytes(data) if isinstance(data, (bytes, bytearray)) else Inert("builtins.bytearray")


def _complex(real: object, imaginary: object = 0.0) -> complex:
    if not isinstance(real, (int, float)) or not isinstance(imaginary, (int, float)):
        raise UnreadableError("holds a complex number of two parts that are no numbers")
    return complex(real, imaginary)


def _list(items: object = (), *_: object) -> list[Any]:
    """Stand for ``deque``."""
    if not isinstance(items, (list, tuple)):
        raise UnreadableError(f"makes a list of a {type(items).__name__}")
    return list(items)


def _set(items: object = ()) -> set[Any]:
    return add(set(), _list(items), Counter())


def _frozenset(items: object = ()) -> frozenset[Any]:
    return frozenset(_set(items))


def _dict(items: object = ()) -> dict[Any, Any]:
    return put({}, _pairs(items), Counter())


def _default_dict(factory: object = None, items: object = ()) -> dict[Any, Any]:
    return _dict(items)


def _ordered_dict(items: object = ()) -> OrderedDict[Any, Any]:
    return put(OrderedDict(), _pairs(items), Counter())


def _counter(items: object = ()) -> Counter[Any]:
    return put(Counter(), _pairs(items), Counter())


def _pairs(items: object) -> Iterable[tuple[Any, Any]]:
    """Return the items of a mapping, which Python 2 wrote as pairs."""
    return items.items() if isinstance(items, dict) else items  # type: ignore[return-value]


def put(mapping: _Mapping, items: Iterable[tuple[Any, Any]], hashes: Counter[str]) -> _Mapping:
    """Set items of a mapping; see :func:`_check_key`."""
    for key, value in items:
        if type(key) is not str:
            _check_key(key, mapping, hashes)
        mapping[key] = value
    return mapping


def add(members: set[Any], items: Iterable[Any], hashes: Counter[str]) -> set[Any]:
    """Add members to a set; see :func:`_check_key`."""
    for item in items:
        if type(item) is not str:
            _check_key(item, members, hashes)
        members.add(item)
    return members


def _check_key(key: object, container: object, hashes: Counter[str]) -> None:
    """Raise unless a key is hashed in little time, and few others of its mapping have the same hash.

    Hashing a deep tuple ends the process, and a million numbers that are chosen to collide take days. Text is safe, as
    Python hashes it with a secret.

    Args:
        key: The key.
        container: What it is for.
        hashes: How many keys of each container have each hash; counted up.
    """
    if key is None or (type(key) is int and abs(key) < 2**31):
        return
    pending = [key]
    for part in pending:  # grows by what is in tuples
        if isinstance(part, (tuple, frozenset)) and len(part) + len(pending) <= _MAX_KEY:
            pending.extend(part)
        elif not isinstance(part, _HASHED):
            kind = "long tuple" if isinstance(part, (tuple, frozenset)) else type(part).__name__
            raise UnreadableError(f"holds a mapping or set with a {kind} as a key; only plain values are read")
    value = f"{id(container)} {hash(key)}"
    hashes[value] += 1
    if hashes[value] > _MAX_COLLISIONS:
        raise UnreadableError("holds a mapping or set of keys that are chosen to collide")


def _tuple(items: object = ()) -> Array | tuple[Any, ...]:
    """Stand for ``tuple``, which PaddlePaddle calls on the name and the numbers of each of its tensors."""
    match items:
        case (str(), Array() as array):
            return array
        case _:
            return tuple(_list(items))


def _reconstruct(kind: object, base: object = None, state: object = None) -> Inert:
    """Stand for how objects are made in the protocols 0 and 1."""
    return Inert(kind.name if isinstance(kind, (Inert, Function)) else "object", base, state)


_HASHED = (
    str, bytes, int, float, complex, type(None), torch.dtype, torch.device,
    Inert, Function, View,  # by their identity
)  # fmt: skip
_STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
}  # fmt: skip
_DTYPES = [
    *_STORAGES.values(), torch.uint16, torch.uint32, torch.uint64,
    torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
]  # fmt: skip
_NUMPY: Mapping[str, Callable[..., object]] = {
    "multiarray._reconstruct": _empty_array,
    "multiarray.scalar": _scalar,
    "numeric._frombuffer": _whole_array,
}
_FUNCTIONS: Mapping[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _view,
    "torch._utils._rebuild_tensor_v2": _view,
    "torch._utils._rebuild_tensor_v3": _typed_view,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _tensor_of_a_class,
    "torch.Size": _size,
    "torch.device": _device,
    # numpy 2 renamed `numpy.core`.
    **{f"numpy.{core}.{name}": function for core in ("core", "_core") for name, function in _NUMPY.items()},
    "numpy.dtype": _numpy_type,
    "collections.OrderedDict": _ordered_dict,
    "collections.Counter": _counter,
    "collections.defaultdict": _default_dict,
    "collections.deque": _list,
    "builtins.set": _set,  # sets have an opcode from protocol 4 on
    "builtins.frozenset": _frozenset,
    "builtins.complex": _complex,
    "_codecs.encode": _encode,
    "builtins.bytes": _no_bytes,  # how Python 3 writes the bytes of an empty array for Python 2
    "builtins.bytearray": _bytearray,
    "builtins.tuple": _tuple,
    "copyreg._reconstructor": _reconstruct,
}

NAMES: Mapping[str, torch.dtype | Function] = {
    **{f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()},
    **{f"torch.cuda.{name}Storage": dtype for name, dtype in _STORAGES.items()},
    **{str(dtype): dtype for dtype in _DTYPES},
    "torch.storage.UntypedStorage": torch.uint8,
    **{name: Function(name, function) for name, function in _FUNCTIONS.items()},
}
"""What is read, by its full name as Python 3 has it; everything else is inert."""

_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # since Python 2


def find(module: str, name: str) -> torch.dtype | Function | Inert:
    """Return what stands for a name: one of `NAMES`, or something inert."""
    full_name = f"{_RENAMED.get(module, module)}.{name}"
    return NAMES.get(full_name) or Inert(full_name)
