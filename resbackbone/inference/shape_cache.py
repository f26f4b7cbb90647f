"""Cache for repeated input shapes: prepacked weights, captured graphs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)
EntryT = TypeVar("EntryT")


class ShapeCache(Generic[KeyT, EntryT]):
    """A cache whose entries are created the second time that their shape is seen, while there is room.

    Creating an entry takes longer than one pass saves, so the first pass of a shape creates none. A repeated shape
    replaces the least recently used entry, if its own last use was later than that entry's. So more shapes in turn than
    there is room for do not evict each other.

    Args:
        capacity: Maximum number of entries.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._seen: OrderedDict[KeyT, EntryT | None] = OrderedDict()  # from the least to the most recently used
        self._lock = threading.Lock()

    def get(self, shape: KeyT, create: Callable[[], EntryT]) -> EntryT | None:
        """Return the entry of a shape, created if the shape is repeated and there is room; None if it has none.

        Args:
            shape: The input shape, or a tuple with more that the entry depends on.
            create: Creates the entry.
        """
        if self._capacity == 0:
            return None
        with self._lock:
            entry = self._seen.get(shape)
            if entry is None and shape in self._seen and self._make_room(shape):
                entry = create()
            self._seen[shape] = entry
            self._seen.move_to_end(shape)
            if len(self._seen) > 16 * self._capacity:
                self._seen.popitem(last=False)
        return entry

    def __iter__(self) -> Iterator[KeyT]:
        """Iterate over the shapes with an entry, from the least to the most recently used."""
        with self._lock:
            return iter(self._cached())

    def _cached(self) -> list[KeyT]:
        return [shape for shape, entry in self._seen.items() if entry is not None]

    def _make_room(self, shape: KeyT) -> bool:
        """Return whether there is room for a shape's entry, if need be after evicting the least recently used one."""
        cached = self._cached()
        if len(cached) < self._capacity:
            return True
        if next(seen for seen in self._seen if seen in (shape, cached[0])) == shape:
            return False
        self._seen[cached[0]] = None
        return True

    def __reduce__(self) -> tuple[type[ShapeCache[KeyT, EntryT]], tuple[int]]:
        return ShapeCache, (self._capacity,)  # entries belong to the process
