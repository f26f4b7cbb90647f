"""Convert the unpickled content of a file to tensors and plain values, a tree of bounded size and depth."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from resbackbone.checkpoints.readers.errors import ADVICE, UnreadableError
from resbackbone.checkpoints.readers.placeholders import Array, NumpyType, Placeholder, SafeFunction, View

MAX_OBJECTS = 1_000_000  # in the content of a file
MAX_DEPTH = 100  # mappings and lists inside one another
_CONTAINERS = (dict, OrderedDict, Counter, list, tuple, set, frozenset)
Skip = Callable[[object], bool]


def skip_nothing(key: object) -> bool:
    """Skip no key."""
    return False


class _Tree:
    """Converter of unpickled content to a tree of values.

    Args:
        tensor_of: Converts the description of a tensor to the tensor.
        skipped: Whether a key is skipped with its mapping or list.
    """

    def __init__(self, tensor_of: Callable[[View], Tensor], skipped: Skip) -> None:
        self._tensor_of = tensor_of
        self._skipped = skipped
        self._left = MAX_OBJECTS
        self._leaves: dict[int, Any] = {}
        self._open: set[int] = set()  # containers that are being converted
        self.placeholders: dict[int, Placeholder] = {}
        self.storages: set[str] = set()  # keys of those that were read

    def convert(self, value: Any, depth: int = 0) -> Any:
        self._left -= 1
        if depth > MAX_DEPTH:
            raise UnreadableError(
                f"is nested more than {MAX_DEPTH} deep; a checkpoint is a mapping of names to tensors"
            )
        if self._left < 0:
            raise UnreadableError(f"holds more than {MAX_OBJECTS:,} objects; a checkpoint holds far fewer")
        if type(value) in _CONTAINERS:
            return self._container(value, depth)
        if id(value) not in self._leaves:
            self._leaves[id(value)] = self._leaf(value)
        return self._leaves[id(value)]

    def _container(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if id(value) in self._open:
            return Placeholder(f"builtins.{kind.__name__}, inside of itself")
        self._open.add(id(value))
        if issubclass(kind, dict):
            result = self._mapping(value, depth + 1)
        else:
            result = kind([self.convert(item, depth + 1) for item in value])
        self._open.discard(id(value))
        return result

    def _mapping(self, mapping: dict[Any, Any], depth: int) -> dict[Any, Any]:
        result: dict[Any, Any] = type(mapping)()
        for key, item in mapping.items():
            if isinstance(item, (dict, list)) and self._skipped(key):
                continue
            result[key if type(key) is str else self.convert(key, depth)] = self.convert(item, depth)
        if isinstance(mapping, OrderedDict) and hasattr(mapping, "_metadata"):
            result._metadata = self.convert(mapping._metadata, depth)  # type: ignore[attr-defined]
        return result

    def _leaf(self, value: object) -> Any:
        match value:
            case View():
                self.storages.add(value.storage.key)
                return self._tensor_of(value)
            case bytearray():
                return bytes(value)
            case None | bool() | int() | float() | complex() | str() | bytes():
                return value
            case torch.dtype() | torch.device() | torch.Size():
                return value
            case Array(tensor=Tensor() as tensor):
                return tensor
            case Placeholder():
                return self.placeholders.setdefault(id(value), value)
            case SafeFunction():
                return Placeholder(value.name)
            case NumpyType():
                return Placeholder("numpy.dtype")
            case _:
                raise UnreadableError(f"holds {type(value).__name__} where a tensor or a plain value should be")


def to_tree(content: object, tensor_of: Callable[[View], Tensor], skipped: Skip = skip_nothing) -> Any:
    """Convert unpickled content to a tree of tensors and plain values.

    Args:
        content: What the unpickler returned. Containers that it refers to twice are copied; tensors are shared.
        tensor_of: Converts the description of a tensor to the tensor.
        skipped: Whether a key of a mapping is skipped with its mapping or list, so that the tensors there are not read.

    Returns:
        The tree; `Placeholder` for each object that is not loaded.

    Raises:
        UnreadableError: If it is not a tree of reasonable depth and size, or holds tensors only inside objects that are
            not loaded.
    """
    tree = _Tree(tensor_of, skipped)
    result = tree.convert(content)
    seen: set[int] = set()
    for placeholder in tree.placeholders.values():
        _check_placeholder(placeholder, tree.storages, seen)
    for placeholder in tree.placeholders.values():
        placeholder.content.clear()
    return result


def _check_placeholder(placeholder: Placeholder, known: Collection[str], seen: set[int]) -> None:
    """Raise if an object that is not loaded has tensors that are nowhere else in the file: they may be the weights."""
    pending: list[Any] = [placeholder]
    while pending:
        value = pending.pop()
        if isinstance(value, View) and value.storage.key not in known:
            raise UnreadableError(
                f"holds tensors inside an object of {placeholder.name!r}, which is not loaded; {ADVICE}"
            )
        if isinstance(value, (Placeholder, dict, list, tuple, set, frozenset)) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, dict):
                pending.extend(value.values())
            pending.extend(value.content if isinstance(value, Placeholder) else value)
