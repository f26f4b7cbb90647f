"""A convolution with what follows it, as one operator of oneDNN, which PyTorch ships for CPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from resbackbone.inference.packs import Packs


class FusedConv2d(nn.Module):
    """``conv(x)``, with a norm folded in, optionally plus another tensor, optionally through ReLU.

    Args:
        conv: The convolution; copied.
        norm: The batch norm behind it, in evaluation; None for none.
        dtype: What to compute in.
        index: Its place in the net, by which its packed weights are stored.

    Attributes:
        relu: Whether ReLU comes last.
        overwrite: Whether the sum may be written over the other tensor.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d, norm: nn.Module | None, dtype: torch.dtype, index: int) -> None:
        super().__init__()
        weight, bias = fold(conv, norm)
        self.register_buffer("weight", weight.to(dtype).to(memory_format=torch.channels_last))
        self.register_buffer("bias", bias.to(dtype))
        self.index = index
        padding: Any = conv.padding  # no text, which `fuse` leaves alone
        self.geometry = (list(padding), list(conv.stride), list(conv.dilation), conv.groups)
        self.relu = False
        self.overwrite = False

    def forward(self, x: Tensor, other: Tensor | None, packs: Packs | None) -> Tensor:
        """Convolve.

        Args:
            x: ``(N, in_channels, H, W)``.
            other: What is added, ``(N, out_channels, H', W')``; None for nothing.
            packs: Where weights packed for this size are; None to use them as they are.
        """
        x = x.contiguous(memory_format=torch.channels_last)  # no copy, but behind layers that work in another format
        weight = self.weight if packs is None else packs.get(self.index, lambda: self._pack(x))
        relu = "relu" if self.relu else "none"
        if other is None:
            out: Tensor = torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *self.geometry, relu, [], "")
            return out
        if other.shape != self._shape_of(x):  # the operator does not broadcast
            out = torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *self.geometry, "none", [], "")
            return torch.relu(out + other) if self.relu else out + other
        other = other.contiguous(memory_format=torch.channels_last)  # the operator fuses with no other format
        operator: Any = torch.ops.mkldnn
        operator = operator._convolution_pointwise_ if self.overwrite else operator._convolution_pointwise
        operands = (other, x) if self.overwrite else (x, other)
        summed: Tensor = operator.binary(
            *operands, weight, self.bias, *self.geometry, "add", 1.0, "relu" if self.relu else None, [], None
        )
        return summed

    def _shape_of(self, x: Tensor) -> tuple[int, ...]:
        padding, stride, dilation, _ = self.geometry
        kernel = self.weight.shape[2:]
        sides = [
            (side + 2 * p - d * (k - 1) - 1) // s + 1
            for side, k, p, s, d in zip(x.shape[2:], kernel, padding, stride, dilation, strict=True)
        ]
        return (x.shape[0], self.weight.shape[0], *sides)

    def _pack(self, x: Tensor) -> Tensor:
        packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self.geometry, list(x.shape))
        return packed

    def extra_repr(self) -> str:
        """Show the sizes in ``repr``."""
        return f"{tuple(self.weight.shape)}, relu={self.relu}, overwrite={self.overwrite}"


def fold(conv: nn.Conv2d, norm: Any) -> tuple[Tensor, Tensor]:
    """Return the weight and the bias of one convolution that does what a convolution and a batch norm do.

    They are computed in double precision: ``weight * s`` and ``beta + (bias - mean) * s``, with ``s = gamma /
    sqrt(var + eps)``.
    """
    standardized = getattr(conv, "standardized_weight", None)  # which in evaluation stays the same
    weight = (conv.weight if standardized is None else standardized()).detach().double()
    bias = torch.zeros(conv.out_channels).double() if conv.bias is None else conv.bias.detach().double()
    if norm is not None:
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.detach().double()
        weight = weight * scale[:, None, None, None]
        bias = (bias - norm.running_mean.double()) * scale
        if norm.bias is not None:
            bias = bias + norm.bias.detach().double()
    return weight.float(), bias.float()
