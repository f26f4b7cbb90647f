"""What is made for one input size when that comes back, and kept while there is room."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

Size = tuple[Any, ...]  # a shape, or more that what is made depends on
T = TypeVar("T")


class ReturningSizes(Generic[T]):
    """What belongs to the sizes used last.

    A size seen for the first time has nothing: to make it takes longer than one pass saves. One that comes back earns
    it, and takes the place of the one used least recently if it was itself used later than that. So sizes that take
    turns, more than there is room for, do not push each other out.

    Args:
        capacity: How many sizes may have something at once.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._seen: OrderedDict[Size, T | None] = OrderedDict()  # in the order of their last use
        self._lock = threading.Lock()

    def get(self, size: Size, make: Callable[[], T]) -> T | None:
        """Return what belongs to a size, made if it came back and there is room; None if it has nothing."""
        if self._capacity == 0:
            return None
        with self._lock:
            found = self._seen.get(size)
            if found is None and size in self._seen and self._has_room(size):
                found = make()
            self._seen[size] = found
            self._seen.move_to_end(size)
            if len(self._seen) > 16 * self._capacity:
                self._seen.popitem(last=False)
        return found

    def __iter__(self) -> Iterator[Size]:
        """The sizes that have something, the one used least recently first."""
        with self._lock:
            return iter(self._having())

    def _having(self) -> list[Size]:
        return [size for size, found in self._seen.items() if found is not None]

    def _has_room(self, size: Size) -> bool:
        """Whether a size may have something; if another must give way, it has."""
        having = self._having()
        if len(having) < self._capacity:
            return True
        if next(other for other in self._seen if other in (size, having[0])) == size:
            return False
        self._seen[having[0]] = None
        return True

    def __reduce__(self) -> tuple[type[ReturningSizes[T]], tuple[int]]:
        return ReturningSizes, (self._capacity,)  # what was made belongs to the process
