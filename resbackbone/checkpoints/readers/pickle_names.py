"""Allowlist of the names in pickles of checkpoints, each with the function that replaces it."""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch

from resbackbone.checkpoints.readers.errors import UnreadableError
from resbackbone.checkpoints.readers.placeholders import (
    Array,
    NumpyType,
    Placeholder,
    SafeFunction,
    View,
    check_sizes,
    read_array,
)

_MAX_KEY = 256  # objects in a key that is a tuple
_MAX_PARTS = 2_000_000  # objects in all such keys; a pickle may repeat a long one for two bytes each
_MAX_COLLISIONS = 100  # keys of one mapping that have the same hash
_MAX_NAME = 2000  # characters; a pickle may repeat a long one for two bytes each

_Mapping = TypeVar("_Mapping", bound=dict[Any, Any])


def _numpy_type(code: object, *_: object) -> NumpyType | Placeholder:
    if isinstance(code, str) and re.fullmatch(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16)", code):
        return NumpyType(np.dtype(code))
    return Placeholder("numpy.dtype", code)


def _empty_array(kind: object, shape: object, code: object) -> Placeholder:
    if not isinstance(kind, Placeholder):
        raise UnreadableError("holds a damaged array")
    return Array() if kind.name == "numpy.ndarray" else Placeholder(kind.name)


def _whole_array(data: object, kind: object, shape: object, order: object) -> Placeholder:
    return (
        Array(read_array(data, kind, shape, order))
        if isinstance(kind, NumpyType)
        else Placeholder("numpy.ndarray", data)
    )


def _scalar(kind: object, data: object = b"") -> bool | int | float | complex | Placeholder:
    if not isinstance(kind, NumpyType):
        return Placeholder("numpy.generic", data)
    value: bool | int | float | complex = read_array(data, kind, ()).item()
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
    """Replace the rebuilding of tensors of a subclass or with attributes: only the tensor is read.

    No other function is called: the cost of a call is counted where the pickle calls.
    """
    known = isinstance(function, SafeFunction) and function.call in _REBUILDERS
    if not known or not isinstance(function, SafeFunction) or not isinstance(arguments, tuple):
        return Placeholder(kind.name if isinstance(kind, Placeholder) else "torch.Tensor", function, arguments)
    return function.call(*arguments)


def _size(sizes: object = ()) -> torch.Size:
    if not isinstance(sizes, (list, tuple)):
        raise UnreadableError("holds a size that is no sequence of integers")
    check_sizes("a tensor", tuple(sizes))
    return torch.Size(sizes)


def _device(kind: object, index: object = None) -> torch.device | Placeholder:
    if not isinstance(kind, str) or not re.fullmatch(r"[a-z]{1,20}(:\d{1,3})?", kind):
        raise UnreadableError("holds a device without a name")
    try:
        return torch.device(kind) if index is None else torch.device(kind, index)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):  # unknown to this release of PyTorch
        return Placeholder("torch.device")


def _encode(text: str, codec: str) -> bytes:
    """Replace ``_codecs.encode``, by which Python 3 writes bytes for Python 2."""
    if codec not in ("latin1", "latin-1"):
        raise UnreadableError("holds bytes that are not written as latin1")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


def _bytearray(data: object = b"", *_: object) -> bytes | Placeholder:
    """Replace ``bytearray``, which would allocate any number of bytes if called with a number."""
    return bytes(data) if isinstance(data, (bytes, bytearray)) else Placeholder("builtins.bytearray")


def _complex(real: object, imaginary: object = 0.0) -> complex:
    if not isinstance(real, (int, float)) or not isinstance(imaginary, (int, float)):
        raise UnreadableError("holds a complex number of two parts that are not numbers")
    return complex(real, imaginary)


def _list(items: object = (), *_: object) -> list[Any]:
    """Replace ``deque``."""
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
    """Return the items of a mapping; Python 2 wrote them as pairs."""
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
    """Check that a key is cheap to hash, and that few other keys of its container have the same hash.

    Hashing a deep tuple ends the process, and a million numbers that are chosen to collide take days. Text is safe, as
    Python hashes it with a secret.

    Args:
        key: The key.
        container: The mapping or set.
        hashes: The number of keys of each container with each hash; updated.
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
    hashes["parts"] += len(pending)
    if hashes["parts"] > _MAX_PARTS:
        raise UnreadableError("holds mappings or sets with long tuples as keys, over and over")
    value = f"{id(container)} {hash(key)}"
    hashes[value] += 1
    if hashes[value] > _MAX_COLLISIONS:
        raise UnreadableError("holds a mapping or set of keys that are chosen to collide")


def _tuple(items: object = ()) -> Array | tuple[Any, ...]:
    """Replace ``tuple``, which PaddlePaddle calls on the name and the array of each of its tensors."""
    match items:
        case (str(), Array() as array):
            return array
        case _:
            return tuple(_list(items))


def _reconstruct(kind: object, base: object = None, state: object = None) -> Placeholder:
    """Replace ``copyreg._reconstructor``, which builds objects in the protocols 0 and 1."""
    return Placeholder(kind.name if isinstance(kind, (Placeholder, SafeFunction)) else "object", base, state)


_REBUILDERS = (_view, _typed_view, _parameter)
_HASHED = (
    str, bytes, int, float, complex, type(None), torch.dtype, torch.device,
    Placeholder, SafeFunction, View,  # by their identity
)  # fmt: skip
_STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
}  # fmt: skip
_DTYPES = [
    *_STORAGES.values(), torch.uint16, torch.uint32, torch.uint64,
    torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
    *([torch.float8_e8m0fnu] if hasattr(torch, "float8_e8m0fnu") else []),  # since PyTorch 2.7
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

NAMES: Mapping[str, torch.dtype | SafeFunction] = {
    **{f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()},
    **{f"torch.cuda.{name}Storage": dtype for name, dtype in _STORAGES.items()},
    **{str(dtype): dtype for dtype in _DTYPES},
    "torch.storage.UntypedStorage": torch.uint8,
    **{name: SafeFunction(name, function) for name, function in _FUNCTIONS.items()},
}
"""What is read, by its full name in Python 3; every other name becomes a placeholder."""

_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # since Python 2


def find(module: str, name: str) -> torch.dtype | SafeFunction | Placeholder:
    """Return the replacement for a name: one of `NAMES`, or a placeholder.

    Raises:
        UnreadableError: If it is longer than names of classes are.
    """
    if len(module) + len(name) > _MAX_NAME:
        raise UnreadableError(
            f"names a class in {len(module) + len(name):,} characters; at most {_MAX_NAME:,} are read"
        )
    full_name = f"{_RENAMED.get(module, module)}.{name}"
    return NAMES.get(full_name) or Placeholder(full_name)
