"""Weights laid out for one input size."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

from torch import Tensor

from resbackbone.inference.convolution import Convolution


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
