"""Convolutions with batch norm folded in, fused with the residual addition and the ReLU that follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resbackbone.layers.conv_norm import fold_batch_norm
from resbackbone.layers.tracing import is_tracing
from resbackbone.layers.weight_standardization import effective_weight

ConvCall = Callable[..., Tensor]  # of the input, and of the tensor to add if there is one


class FusedConv2d(nn.Module):
    """``relu(norm(conv(x)) + other)`` as one module of PyTorch operators, on any device.

    Args:
        conv: The convolution; its weights are copied.
        norm: The batch norm behind it, in eval mode, to fold into the weights; None for none.
        dtype: Dtype of the computation.

    Attributes:
        relu: Whether ReLU comes last.
        overwrite: Whether the sum may be written over ``other``.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d, norm: nn.Module | None, dtype: torch.dtype) -> None:
        super().__init__()
        weight, bias = fold(conv, norm)
        self.register_buffer("weight", weight.to(dtype).to(memory_format=torch.channels_last))
        self.register_buffer("bias", bias.to(dtype))
        padding: Any = conv.padding  # `fuse` leaves out convolutions with padding="same"
        self.geometry = (list(padding), list(conv.stride), list(conv.dilation), conv.groups)
        self.relu = False
        self.overwrite = False

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Convolve ``(N, in_channels, H, W)``, and add a tensor broadcastable to ``(N, out_channels, H', W')``."""
        padding, stride, dilation, groups = self.geometry
        out = F.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups)
        if other is not None:
            in_place = not is_tracing() and out.shape == other.shape
            out = out.add_(other) if in_place else out + other
        return out.relu_() if self.relu else out

    def extra_repr(self) -> str:
        """Show the weight's shape and what is fused in ``repr``."""
        return f"{tuple(self.weight.shape)}, relu={self.relu}, overwrite={self.overwrite}"


class OneDNNConv2d(FusedConv2d):
    """The same as one operator of oneDNN, the CPU library inside PyTorch."""

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Convolve ``(N, in_channels, H, W)``, and add a tensor broadcastable to ``(N, out_channels, H', W')``."""
        return self._convolve(self.weight, x, other)

    def forward_eager(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Compute the same with PyTorch operators, which propagate NaN; oneDNN's ReLU turns NaN into 0."""
        return super().forward(x, other)

    def prepack(self, x: Tensor, other: Tensor | None) -> ConvCall:
        """Return a call for inputs of these shapes and memory formats, with weights reordered for them."""
        shape = list(x.shape)
        weight: Tensor = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self.geometry, shape)
        if not all(map(_is_channels_last, (x, other))) or self._broadcasts(x, other):
            return partial(self._convolve, weight)
        return self._bind(weight, adds=other is not None, relu=self.relu)

    def _convolve(self, weight: Tensor, x: Tensor, other: Tensor | None = None) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)  # copies only behind layers with contiguous outputs
        if other is None:
            return self._bind(weight, adds=False, relu=self.relu)(x)
        if self._broadcasts(x, other):
            out = self._bind(weight, adds=False, relu=False)(x) + other
            return out.relu_() if self.relu else out
        other = other.contiguous(memory_format=torch.channels_last)  # the only format that the operator fuses
        return self._bind(weight, adds=True, relu=self.relu)(x, other)

    def _broadcasts(self, x: Tensor, other: Tensor | None) -> bool:
        """Return whether the addition broadcasts, which oneDNN's operator does not support."""
        return other is not None and other.shape != output_shape(x, self.weight, *self.geometry[:3])

    def _bind(self, weight: Tensor, *, adds: bool, relu: bool) -> ConvCall:
        """Return the operator with all arguments bound that are the same in every call."""
        operators: Any = torch.ops.mkldnn
        fixed: tuple[Any, ...] = (weight, self.bias, *self.geometry)
        if not adds:
            fixed += ("relu" if relu else "none", [], "")
            convolve = operators._convolution_pointwise.default
            return lambda x, other=None: convolve(x, *fixed)
        fixed += ("add", 1.0, "relu" if relu else None, [], None)
        if self.overwrite:
            convolve_add_ = operators._convolution_pointwise_.binary
            return lambda x, other: convolve_add_(other, x, *fixed)
        convolve_add = operators._convolution_pointwise.binary
        return lambda x, other: convolve_add(x, other, *fixed)


def _is_channels_last(x: Tensor | None) -> bool:
    return x is None or x.is_contiguous(memory_format=torch.channels_last)


def fold(conv: nn.Conv2d, norm: Any) -> tuple[Tensor, Tensor]:
    """Return the weight and bias of a convolution with the batch norm behind it folded in, computed in float64."""
    weight = effective_weight(conv).detach().double()
    bias = None if conv.bias is None else conv.bias.detach().double()
    if norm is not None:
        gamma, beta = (None if tensor is None else tensor.detach().double() for tensor in (norm.weight, norm.bias))
        mean, var = norm.running_mean.double(), norm.running_var.double()
        weight, bias = fold_batch_norm(weight, bias, gamma, beta, mean, var, norm.eps)
    return weight.float(), weight.new_zeros(len(weight)).float() if bias is None else bias.float()


def output_shape(
    x: Tensor, weight: Tensor, padding: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """Return the output shape of a convolution."""
    sides = [
        (side + 2 * p - d * (k - 1) - 1) // s + 1
        for side, k, p, s, d in zip(x.shape[2:], weight.shape[2:], padding, stride, dilation, strict=True)
    ]
    return (x.shape[0], weight.shape[0], *sides)
