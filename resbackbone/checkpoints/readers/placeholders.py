"""Placeholders for the objects of a pickle: descriptions of tensors and arrays, and placeholders for all else."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resbackbone.checkpoints.readers.errors import ADVICE, UnreadableError
from resbackbone.utils.validation import excerpt

_MAX_DIMENSIONS = 32


class Placeholder:
    """Placeholder for an object, class or function that is not loaded: nothing is imported, called or set.

    Attributes:
        name: The full name of the class or function; printable, and shortened.
        content: What the pickle passes to it; empty once the file has been read.
    """

    __slots__ = ("content", "name")

    def __init__(self, name: str, *content: object) -> None:
        self.name = excerpt(name)
        self.content = list(content)

    def __repr__(self) -> str:
        """Return the name of what is not loaded."""
        return f"<{self.name}, not loaded>"


@dataclass(frozen=True, eq=False, slots=True)
class SafeFunction:
    """Replacement for a function or class that a pickle may call.

    Attributes:
        name: The full name of what is replaced.
        call: What is called in its place.
    """

    name: str
    call: Callable[..., object]


@dataclass(frozen=True, eq=False, slots=True)
class Storage:
    """Reference to a storage, whose bytes are elsewhere in the file.

    Attributes:
        key: Its name in the file.
        dtype: The type of its elements.
        start: The first element that belongs to it.
        count: The number of elements that belong to it.
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
            case ("storage", Placeholder(name=name), *_):
                raise UnreadableError(f"holds tensors of the unknown type {name!r}; {ADVICE}")
            case _:
                raise UnreadableError("refers to something outside that is no storage of numbers")
        check_sizes("a storage", (start, count))
        return cls(key, dtype, start, count)


@dataclass(frozen=True, eq=False, slots=True)
class View:
    """Description of a tensor over a storage; ``offset`` and ``stride`` are in elements of ``dtype``."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        storage: object = self.storage
        if isinstance(storage, Placeholder):
            raise UnreadableError(f"holds a tensor with a storage of {storage.name!r}; {ADVICE}")
        if not isinstance(storage, Storage) or not isinstance(self.dtype, torch.dtype):
            raise UnreadableError("holds a tensor without a storage of numbers")
        check_sizes("a tensor", (self.offset, *self.size, *self.stride))
        count = math.prod(self.size)
        last = self.offset + sum((length - 1) * step for length, step in zip(self.size, self.stride, strict=True))
        available = self.storage.count * self.storage.dtype.itemsize // self.dtype.itemsize
        if count and max(count, last + 1) > available:
            raise UnreadableError(
                f"holds a tensor of shape {self.size} and stride {self.stride} over a storage of {available} elements"
            )


class NumpyType:
    """Description of a ``numpy.dtype`` of numbers."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype

    def build(self, state: object) -> None:
        """Set the byte order from numpy's pickled state: version, order, and five fields for types of other kinds."""
        match state:
            case (int(), "<" | ">" | "=" | "|" as order, None, None, None, *_):
                self.dtype = self.dtype.newbyteorder(order)
            case _:
                raise UnreadableError("holds an array with fields; only arrays of numbers are read")


class Array(Placeholder):
    """Placeholder for a ``numpy.ndarray``; its tensor is None until its state comes, and for arrays of other types."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor | None = None) -> None:
        super().__init__("numpy.ndarray")
        self.tensor = tensor

    def build(self, state: object) -> None:
        """Set the tensor from numpy's pickled state: version, shape, type, whether in Fortran's order, bytes."""
        match state:
            case (int(), tuple(shape), NumpyType() as kind, bool() | int() as fortran, data):
                self.tensor = read_array(data, kind, shape, "F" if fortran else "C")
            case (int(), tuple(), Placeholder(), bool() | int(), data):
                self.content.append(data)
            case _:
                raise UnreadableError("holds a damaged array")


def check_sizes(owner: str, sizes: tuple[object, ...]) -> None:
    """Check that these can be the sizes, strides and offsets of a tensor."""
    for size in sizes:
        if not isinstance(size, int) or not 0 <= size < 2**63:
            raise UnreadableError(f"holds {owner} of an impossible size")
    if len(sizes) > 2 * _MAX_DIMENSIONS + 1:
        raise UnreadableError(f"holds {owner} of an impossible size")


def _bytes(data: object) -> bytes | bytearray:
    """Return the bytes of an array; Python 2 wrote them as a string."""
    if isinstance(data, str):
        return data.encode("latin1")
    if isinstance(data, (bytes, bytearray)):
        return data
    raise UnreadableError(f"holds an array whose numbers are a {type(data).__name__}; only bytes are read")


def read_array(data: object, kind: NumpyType, shape: object, order: object = "C") -> Tensor:
    """Convert the bytes of an array to a tensor."""
    content = _bytes(data)
    if not isinstance(shape, tuple) or order not in ("C", "F"):
        raise UnreadableError("holds a damaged array")
    check_sizes("an array", shape)
    if math.prod(shape) * kind.dtype.itemsize != len(content):
        raise UnreadableError(f"holds an array of shape {shape} and type {kind.dtype} in {len(content)} bytes")
    values = np.frombuffer(content, kind.dtype).reshape(shape, order=order)
    # Long ones are a bytearray of their own, which the tensor shares.
    copied = np.array if isinstance(content, bytes) else np.asarray
    return torch.from_numpy(copied(values, dtype=kind.dtype.newbyteorder("="), order="C"))
