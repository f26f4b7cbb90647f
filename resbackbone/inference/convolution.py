"""A convolution with what follows it: norm, sum and ReLU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resbackbone.layers.folded_convolution import output_shape
from resbackbone.layers.tracing import is_tracing

Convolution = Callable[..., Tensor]  # of one tensor, or of one and what is added


class FoldedConv2d(nn.Module):
    """``conv(x)``, with a norm folded in, optionally plus another tensor, optionally through ReLU.

    Args:
        conv: The convolution; copied.
        norm: The batch norm behind it, in evaluation; None for none.
        dtype: What to compute in.

    Attributes:
        relu: Whether ReLU comes last.
        overwrite: Whether the sum may be written over the other tensor.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d, norm: nn.Module | None, dtype: torch.dtype) -> None:
        super().__init__()
        weight, bias = fold(conv, norm)
        self.register_buffer("weight", weight.to(dtype).to(memory_format=torch.channels_last))
        self.register_buffer("bias", bias.to(dtype))
        padding: Any = conv.padding  # no text, which `fuse` leaves alone
        self.geometry = (list(padding), list(conv.stride), list(conv.dilation), conv.groups)
        self.relu = False
        self.overwrite = False

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Convolve ``(N, in_channels, H, W)``, and add ``(N, out_channels, H', W')`` or what spreads to that."""
        padding, stride, dilation, groups = self.geometry
        out = F.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups)
        if other is not None:
            in_place = not is_tracing() and out.shape == other.shape
            out = out.add_(other) if in_place else out + other
        return out.relu_() if self.relu else out

    def extra_repr(self) -> str:
        """Show the sizes in ``repr``."""
        return f"{tuple(self.weight.shape)}, relu={self.relu}, overwrite={self.overwrite}"


class FusedConv2d(FoldedConv2d):
    """The same as one operator of oneDNN, which PyTorch ships for CPUs."""

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Convolve ``(N, in_channels, H, W)``, and add ``(N, out_channels, H', W')`` or what spreads to that."""
        return self._convolve(self.weight, x, other)

    def plainly(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Compute the same with PyTorch's own operators: oneDNN's ReLU makes zeros of NaN."""
        return super().forward(x, other)

    def specialize(self, x: Tensor, other: Tensor | None) -> Convolution:
        """Return what does the same to tensors of these shapes and layouts, with weights laid out for them."""
        shape = list(x.shape)
        weight: Tensor = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self.geometry, shape)
        if not all(map(_is_channels_last, (x, other))) or self._spreads(x, other):
            return partial(self._convolve, weight)
        return self._bind(weight, adds=other is not None, relu=self.relu)

    def _convolve(self, weight: Tensor, x: Tensor, other: Tensor | None = None) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)  # no copy, but behind layers that work in another format
        if other is None:
            return self._bind(weight, adds=False, relu=self.relu)(x)
        if self._spreads(x, other):  # which the operator does not
            out = self._bind(weight, adds=False, relu=False)(x) + other
            return out.relu_() if self.relu else out
        other = other.contiguous(memory_format=torch.channels_last)  # the operator fuses with no other format
        return self._bind(weight, adds=True, relu=self.relu)(x, other)

    def _spreads(self, x: Tensor, other: Tensor | None) -> bool:
        return other is not None and other.shape != output_shape(x, self.weight, *self.geometry[:3])

    def _bind(self, weight: Tensor, *, adds: bool, relu: bool) -> Convolution:
        """Return the operator with all that stays the same from call to call."""
        operators: Any = torch.ops.mkldnn
        fixed: tuple[Any, ...] = (weight, self.bias, *self.geometry)
        if not adds:
            fixed += ("relu" if relu else "none", [], "")
            alone = operators._convolution_pointwise.default
            return lambda x, other=None: alone(x, *fixed)
        fixed += ("add", 1.0, "relu" if relu else None, [], None)
        if self.overwrite:
            in_place = operators._convolution_pointwise_.binary
            return lambda x, other: in_place(other, x, *fixed)
        anew = operators._convolution_pointwise.binary
        return lambda x, other: anew(x, other, *fixed)


def _is_channels_last(x: Tensor | None) -> bool:
    return x is None or x.is_contiguous(memory_format=torch.channels_last)


def fold(conv: nn.Conv2d, norm: Any) -> tuple[Tensor, Tensor]:
    """Return the weight and the bias of one convolution that does what a convolution and a batch norm do.

    They are computed in double precision: ``weight * s`` and ``beta + (bias - mean) * s``, with ``s = gamma /
    sqrt(var + eps)``.
    """
    standardized = getattr(conv, "standardized_weight", None)  # which in evaluation stays the same
    weight = (conv.weight if standardized is None else standardized()).detach().double()
    bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach().double()
    if norm is not None:
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.detach().double()
        weight = weight * scale[:, None, None, None]
        bias = (bias - norm.running_mean.double()) * scale
        if norm.bias is not None:
            bias = bias + norm.bias.detach().double()
    return weight.float(), bias.float()
