"""What is made for one input size when that comes back, and kept while there is room."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Size = tuple[int, ...]
T = TypeVar("T")


class ReturningSizes(Generic[T]):
    """What belongs to the sizes used last.

    A size seen for the first time has nothing: to make it takes longer than one pass saves. One that comes back earns
    it, and those used least recently make room.

    Args:
        capacity: How many sizes may have something at once.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._seen: OrderedDict[Size, T | None] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, size: Size, make: Callable[[], T]) -> T | None:
        """Return what belongs to a size, made if it comes back for the first time; None if it never came before."""
        if self._capacity == 0:
            return None
        with self._lock:
            known = size in self._seen
            found = self._seen.pop(size, None)
            if known and found is None:
                found = make()
            self._seen[size] = found
            self._make_room()
        return found

    def __iter__(self) -> Iterator[Size]:
        """The sizes that have something, the one used least recently first."""
        with self._lock:
            return iter([size for size, found in self._seen.items() if found is not None])

    def _make_room(self) -> None:
        having = [size for size, found in self._seen.items() if found is not None]
        for size in having[: len(having) - self._capacity]:
            del self._seen[size]
        while len(self._seen) > 16 * self._capacity:  # sizes that never came back
            self._seen.popitem(last=False)

    def __reduce__(self) -> tuple[type[ReturningSizes[T]], tuple[int]]:
        return ReturningSizes, (self._capacity,)  # what was made belongs to the process
