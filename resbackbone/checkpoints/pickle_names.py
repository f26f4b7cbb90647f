"""The names that pickles of checkpoints hold, and what stands for each: descriptions, and inert functions of ours."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MAX_DIMENSIONS = 32


class UnreadableError(ValueError):
    """What is wrong with a file, worded to follow its name: "is empty; download it again"."""


@dataclass(frozen=True, eq=False)
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
            case _:
                raise UnreadableError("refers to something outside that is no storage of numbers")
        _check_sizes("a storage", (start, count))
        return cls(key, dtype, start, count)


@dataclass(frozen=True, eq=False)
class View:
    """A tensor over a storage: ``offset``, ``size`` and ``stride`` are counted in elements of ``dtype``."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.storage, Storage) or not isinstance(self.dtype, torch.dtype):
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
    """Stands for ``numpy.dtype``: plain numbers only."""

    def __init__(self, code: object, align: object = False, copy: object = False) -> None:
        if not isinstance(code, str):
            raise UnreadableError("holds a damaged array")
        if not re.fullmatch(r"[<>|=]?(b1|[iu][1248]|f[248])", code):
            raise UnreadableError(f"holds an array of type {code[:20]!r}; only arrays of numbers are read")
        self.dtype = np.dtype(code)

    def build(self, state: object) -> None:
        """Take on the byte order from what numpy pickles: version, order, and five fields for types of other kinds."""
        match state:
            case (int(), "<" | ">" | "=" | "|" as order, None, None, None, *_):
                self.dtype = self.dtype.newbyteorder(order)
            case _:
                raise UnreadableError("holds an array with fields; only arrays of numbers are read")


class Array:
    """Stands for ``numpy.ndarray``: empty until its numbers come."""

    tensor: Tensor | None = None

    def build(self, state: object) -> None:
        """Take on the numbers from what numpy pickles: version, shape, type, whether Fortran's order, bytes."""
        match state:
            case (int(), tuple(shape), NumpyType() as kind, bool() | int() as fortran, data):
                self.tensor = _array(data, kind, shape, "F" if fortran else "C")
            case _:
                raise UnreadableError("holds a damaged array")


class Nothing:
    """Stands for an object whose content nobody needs, such as a log."""

    def __init__(self, *_: object) -> None:
        pass

    def build(self, state: object) -> None:
        """Drop the content."""


def _check_sizes(owner: str, sizes: tuple[object, ...]) -> None:
    whole = all(isinstance(size, int) and 0 <= size < 2**63 for size in sizes)
    if not whole or len(sizes) > 2 * _MAX_DIMENSIONS + 1:
        raise UnreadableError(f"holds {owner} of an impossible size")


def _bytes(data: object) -> bytes | memoryview:
    """Return the bytes of an array, which Python 2 wrote as a string."""
    if isinstance(data, str):
        return data.encode("latin1")
    if isinstance(data, (bytes, memoryview)):
        return data
    raise UnreadableError(f"holds an array whose numbers are a {type(data).__name__}; only bytes are read")


def _array(data: object, kind: object, shape: object, order: object = "C") -> Tensor:
    content = _bytes(data)
    if not isinstance(kind, NumpyType) or not isinstance(shape, tuple) or order not in ("C", "F"):
        raise UnreadableError("holds a damaged array")
    _check_sizes("an array", shape)
    if math.prod(shape) * kind.dtype.itemsize != len(content):
        raise UnreadableError(f"holds an array of shape {shape} and type {kind.dtype} in {len(content)} bytes")
    values = np.frombuffer(content, kind.dtype).reshape(shape, order=order)
    # Copied: in the file they are neither aligned nor ours to write.
    return torch.from_numpy(np.array(values, dtype=kind.dtype.newbyteorder("="), order="C"))


def _empty_array(kind: object, shape: object, code: object) -> Array:
    if kind is not Array:
        raise UnreadableError("holds a damaged array")
    return Array()


def _whole_array(data: object, kind: object, shape: object, order: object) -> Array:
    array = Array()
    array.tensor = _array(data, kind, shape, order)
    return array


def _scalar(kind: object, data: object) -> bool | int | float:
    value: bool | int | float = _array(data, kind, ()).item()
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


def _device(kind: object, index: object = None) -> str:
    match kind, index:
        case str(), None:
            return kind
        case str(), int():
            return f"{kind}:{index}"
        case _:
            raise UnreadableError("holds a device without a name")


def _encode(text: str, codec: str) -> bytes:
    """Stand for ``_codecs.encode``, the way in which bytes are written for Python 2."""
    if codec not in ("latin1", "latin-1"):
        raise UnreadableError("holds bytes that are not written as latin1")
    return text.encode("latin1")


def _mapping(items: object = ()) -> dict[Any, Any]:
    """Stand for ``OrderedDict`` and ``Counter``; Python 2 wrote their items as pairs."""
    result: dict[Any, Any] = {}
    for key, value in items.items() if isinstance(items, dict) else items:  # type: ignore[attr-defined]
        put(result, key, value)
    return result


def put(mapping: dict[Any, Any], key: object, value: object) -> None:
    """Set an item whose key is a name or a small number; the keys of anything else cost unbounded time to hash."""
    if not isinstance(key, str) and not (isinstance(key, int) and abs(key) < 2**31):
        raise UnreadableError(f"holds a mapping whose key is a {type(key).__name__}; only names and indices are read")
    mapping[key] = value


def _named_array(pair: object) -> Array:
    """Stand for ``tuple``, which PaddlePaddle calls on the name and the numbers of each of its tensors."""
    match pair:
        case (str(), Array() as array):
            return array
        case _:
            raise UnreadableError("calls `builtins.tuple` on something other than a tensor of PaddlePaddle")


def _nothing(*_: object) -> None:
    """Stand for a function whose result nobody needs: mmengine's log refers to its methods by ``getattr``."""


_STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool,
}  # fmt: skip
_DTYPES = [
    *_STORAGES.values(), torch.uint16, torch.uint32, torch.uint64,
    torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
]  # fmt: skip
_NUMPY = {
    "multiarray._reconstruct": _empty_array,
    "multiarray.scalar": _scalar,
    "numeric._frombuffer": _whole_array,
}

NAMES: Mapping[str, object] = {
    **{f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()},
    **{f"torch.cuda.{name}Storage": dtype for name, dtype in _STORAGES.items()},
    **{str(dtype): dtype for dtype in _DTYPES},
    "torch.storage.UntypedStorage": torch.uint8,
    "torch._utils._rebuild_tensor": _view,
    "torch._utils._rebuild_tensor_v2": _view,
    "torch._utils._rebuild_tensor_v3": _typed_view,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.Size": lambda sizes: tuple(sizes),
    "torch.device": _device,
    # numpy 2 renamed `numpy.core`.
    **{f"numpy.{core}.{name}": stand_in for core in ("core", "_core") for name, stand_in in _NUMPY.items()},
    "numpy.ndarray": Array,
    "numpy.dtype": NumpyType,
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "_codecs.encode": _encode,
    "builtins.bytes": lambda: b"",  # how Python 3 writes the bytes of an empty array for Python 2
    "builtins.tuple": _named_array,
    "builtins.getattr": _nothing,
    "mmengine.logging.history_buffer.HistoryBuffer": Nothing,
}
"""What may be named, by its full name as Python 3 has it."""


def find(module: object, name: object) -> object:
    """Return what stands for a name.

    Raises:
        UnreadableError: If the name is not in `NAMES`.
    """
    if not isinstance(module, str) or not isinstance(name, str):
        raise UnreadableError("names something that is no name")
    full_name = f"{'builtins' if module == '__builtin__' else module}.{name}"
    if full_name not in NAMES:
        raise UnreadableError(
            f"names {full_name[:200]!r}, which is neither a tensor nor a numpy array nor a plain value; nothing was "
            "run. If you trust its author, load it in the program that wrote it, and save the weights alone: "
            "torch.save(model.state_dict(), 'weights.pth')"
        )
    return NAMES[full_name]
