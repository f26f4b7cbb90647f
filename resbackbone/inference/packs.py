"""Weights laid out for one input size; made when a size comes back, kept while they fit into a limit of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor

Size = tuple[int, ...]


class Packs:
    """The packed weights of one input size, by the convolution's index."""

    def __init__(self) -> None:
        self._packs: dict[int, Tensor] = {}

    def get(self, index: int, pack: Callable[[], Tensor]) -> Tensor:
        """Return a convolution's packed weight, packing it if that has not been done."""
        found = self._packs.get(index)
        if found is None:
            found = self._packs[index] = pack()  # two threads may do it at once, to the same end
        return found


class PackStore:
    """The packs of the sizes used last.

    A size seen for the first time has none: packing takes longer than one pass saves. One that comes back earns them,
    and those used least recently make room.

    Args:
        limit: Bytes that all packs may take together; 0 for none.
        bytes_each: Bytes that the packs of one size take.
    """

    def __init__(self, limit: int, bytes_each: int) -> None:
        self.capacity = limit // max(bytes_each, 1)
        self._seen: OrderedDict[Size, Packs | None] = OrderedDict()
        self._lock = threading.Lock()

    def packs_for(self, size: Size) -> Packs | None:
        """Return the packs of a size, empty ones when it comes back for the first time, and None before."""
        if self.capacity == 0:
            return None
        with self._lock:
            known = size in self._seen
            packs = self._seen.pop(size, None)
            if known and packs is None:
                packs = Packs()
            self._seen[size] = packs
            self._make_room()
        return packs

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes that have packs, the one used least recently first."""
        with self._lock:
            return tuple(size for size, packs in self._seen.items() if packs is not None)

    def _make_room(self) -> None:
        packed = [size for size, packs in self._seen.items() if packs is not None]
        for size in packed[: len(packed) - self.capacity]:
            del self._seen[size]
        while len(self._seen) > 16 * self.capacity:  # sizes that never came back
            self._seen.popitem(last=False)

    def __getstate__(self) -> dict[str, int]:
        return {"capacity": self.capacity}  # packs belong to the process, and have no storage to pickle

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(state["capacity"], 1)  # type: ignore[misc]
