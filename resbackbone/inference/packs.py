"""Weights laid out for one input size; made when a size comes back, kept while they fit into a limit of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Protocol

from torch import Tensor

from resbackbone.inference.convolution import Convolution

Size = tuple[int, ...]


class Packable(Protocol):
    """A convolution whose weights can be laid out for one input size."""

    weight: Tensor

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Convolve a tensor, and add another, of any size."""

    def specialize(self, x: Tensor, other: Tensor | None) -> Convolution:
        """Return what does the same to tensors of these shapes and layouts, with weights laid out for them."""


class Packs:
    """A net's convolutions for one input size, each packed when it is first called."""

    def __init__(self, convolutions: Sequence[Packable]) -> None:
        self.calls: list[Convolution] = [partial(self._pack, index) for index in range(len(convolutions))]
        self._convolutions = convolutions

    def _pack(self, index: int, x: Tensor, other: Tensor | None = None) -> Tensor:
        packed = self._convolutions[index].specialize(x, other)
        self.calls[index] = packed  # two threads may do it at once, to the same end
        return packed(x, other)


class PackStore:
    """The packs of the sizes used last.

    A size seen for the first time has none: packing takes longer than one pass saves. One that comes back earns them,
    and those used least recently make room.

    Args:
        convolutions: What is packed.
        limit: Bytes that all packs may take together; 0 for none.
    """

    def __init__(self, convolutions: Sequence[Packable], limit: int) -> None:
        self._convolutions = convolutions
        self._limit = limit
        self._plain: list[Convolution] = [convolution.forward for convolution in convolutions]
        self._capacity = limit // max(sum(conv.weight.nbytes for conv in convolutions), 1)  # sizes
        self._seen: OrderedDict[Size, Packs | None] = OrderedDict()
        self._lock = threading.Lock()

    def calls_for(self, size: Size) -> Sequence[Convolution]:
        """Return the convolutions for images of a size: packed if it came before, as they are if not."""
        if self._capacity == 0:
            return self._plain
        with self._lock:
            known = size in self._seen
            packs = self._seen.pop(size, None)
            if known and packs is None:
                packs = Packs(self._convolutions)
            self._seen[size] = packs
            self._make_room()
        return self._plain if packs is None else packs.calls

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes that have packs, the one used least recently first."""
        with self._lock:
            return tuple(size for size, packs in self._seen.items() if packs is not None)

    def _make_room(self) -> None:
        packed = [size for size, packs in self._seen.items() if packs is not None]
        for size in packed[: len(packed) - self._capacity]:
            del self._seen[size]
        while len(self._seen) > 16 * self._capacity:  # sizes that never came back
            self._seen.popitem(last=False)

    def __reduce__(self) -> tuple[type[PackStore], tuple[Sequence[Packable], int]]:
        return PackStore, (self._convolutions, self._limit)  # packs belong to the process; they cannot be pickled
