"""Convolutions with weights prepacked, that is reordered, for one input shape."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

from torch import Tensor

from resbackbone.inference.fused_conv import ConvCall


class PrepackableConv(Protocol):
    """A convolution that can reorder its weights for one input shape."""

    weight: Tensor

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Convolve an input of any shape, and add another tensor."""

    def prepack(self, x: Tensor, other: Tensor | None) -> ConvCall:
        """Return a call for inputs of these shapes and memory formats, with weights reordered for them."""


class PrepackedConvs:
    """The convolutions of a net for one input shape, each prepacked in its first call."""

    def __init__(self, convolutions: Sequence[PrepackableConv]) -> None:
        self.calls: list[ConvCall] = [partial(self._prepack, index) for index in range(len(convolutions))]
        self._convolutions = convolutions

    def _prepack(self, index: int, x: Tensor, other: Tensor | None = None) -> Tensor:
        call = self._convolutions[index].prepack(x, other)
        self.calls[index] = call  # two threads may do so at once, with the same result
        return call(x, other)
