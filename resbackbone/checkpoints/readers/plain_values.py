"""Convert what was read from a pickle to tensors and plain values, a tree of bounded size and depth."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from resbackbone.checkpoints.readers.placeholders import (
    ADVICE,
    Array,
    Function,
    Inert,
    NumpyType,
    UnreadableError,
    View,
)

MAX_OBJECTS = 1_000_000
"""Objects in the content of a file."""

MAX_DEPTH = 100
"""Mappings and lists inside one another."""


_CONTAINERS = (dict, OrderedDict, Counter, list, tuple, set, frozenset)
Skip = Callable[[object], bool]


def skip_nothing(key: object) -> bool:
    """Leave out nothing."""
    return False


class _Tree:
    """Makes a tree of values of an unpickler's object.

    Args:
        tensor_of: Makes a tensor of a view.
        skipped: Whether the values below a key of a mapping are left out.
    """

    def __init__(self, tensor_of: Callable[[View], Tensor], skipped: Skip) -> None:
        self._tensor_of = tensor_of
        self._skipped = skipped
        self._left = MAX_OBJECTS
        self._made: dict[int, Any] = {}
        self._open: set[int] = set()  # containers that are being walked
        self.inert: dict[int, Inert] = {}
        self.read: set[str] = set()  # keys of storages

    def walk(self, value: Any, depth: int = 0) -> Any:
        self._left -= 1
        if depth > MAX_DEPTH:
            raise UnreadableError(
                f"is nested more than {MAX_DEPTH} deep; a checkpoint is a mapping of names to tensors"
            )
        if self._left < 0:
            raise UnreadableError(f"holds more than {MAX_OBJECTS:,} objects; a checkpoint holds far fewer")
        if type(value) in _CONTAINERS:
            return self._container(value, depth)
        if id(value) not in self._made:
            self._made[id(value)] = self._leaf(value)
        return self._made[id(value)]

    def _container(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if id(value) in self._open:
            return Inert(f"builtins.{kind.__name__}, inside of itself")
        self._open.add(id(value))
        if issubclass(kind, dict):
            result = self._mapping(value, depth + 1)
        else:
            result = kind([self.walk(item, depth + 1) for item in value])
        self._open.discard(id(value))
        return result

    def _mapping(self, mapping: dict[Any, Any], depth: int) -> dict[Any, Any]:
        result: dict[Any, Any] = type(mapping)()
        for key, item in mapping.items():
            if isinstance(item, (dict, list)) and self._skipped(key):
                continue
            result[key if type(key) is str else self.walk(key, depth)] = self.walk(item, depth)
        if isinstance(mapping, OrderedDict) and hasattr(mapping, "_metadata"):
            result._metadata = self.walk(mapping._metadata, depth)  # type: ignore[attr-defined]
        return result

    def _leaf(self, value: object) -> Any:
        match value:
            case View():
                self.read.add(value.storage.key)
                return self._tensor_of(value)
            case bytearray():
                return bytes(value)
            case None | bool() | int() | float() | complex() | str() | bytes():
                return value
            case torch.dtype() | torch.device() | torch.Size():
                return value
            case Array(tensor=Tensor() as tensor):
                return tensor
            case Inert():
                return self.inert.setdefault(id(value), value)
            case Function():
                return Inert(value.name)
            case NumpyType():
                return Inert("numpy.dtype")
            case _:
                raise UnreadableError(f"holds {type(value).__name__} where a tensor or a plain value should be")


def to_tree(content: object, tensor_of: Callable[[View], Tensor], skipped: Skip = skip_nothing) -> Any:
    """Return an unpickler's object with tensors in place of stand-ins, as a tree.

    Args:
        content: The object. What it refers to twice is there twice, but tensors are shared.
        tensor_of: Makes a tensor of a view.
        skipped: Whether mappings and lists below a key of a mapping are left out, and their tensors not read.

    Returns:
        The tree; `Inert` where objects are that are not loaded.

    Raises:
        UnreadableError: If it is not a tree of reasonable depth and size, holds something that is no value, or has
            tensors in objects that are not loaded and nowhere else.
    """
    reader = _Tree(tensor_of, skipped)
    result = reader.walk(content)
    seen: set[int] = set()
    for inert in reader.inert.values():
        _check_inert(inert, reader.read, seen)
    for inert in reader.inert.values():
        inert.content.clear()
    return result


def _check_inert(inert: Inert, known: Collection[str], seen: set[int]) -> None:
    """Raise if an object has tensors that are nowhere else in the file: who wrote it means them as weights."""
    pending: list[Any] = [inert]
    while pending:
        value = pending.pop()
        if isinstance(value, View) and value.storage.key not in known:
            raise UnreadableError(f"holds tensors inside an object of {inert.name!r}, which is not loaded; {ADVICE}")
        if isinstance(value, (Inert, dict, list, tuple, set, frozenset)) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, dict):
                pending.extend(value.values())
            pending.extend(value.content if isinstance(value, Inert) else value)
