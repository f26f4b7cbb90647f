"""Convolutions in int8, and conversions between float32 and uint8."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resbackbone.inference.fused_conv import ConvCall, OneDNNConv2d, output_shape


class QuantParams(NamedTuple):
    """Scale and zero point of a quantized tensor: the integer ``q`` stands for ``(q - zero_point) * scale``."""

    scale: float
    zero_point: int

    @classmethod
    def from_range(cls, low: float, high: float) -> QuantParams:
        """Return the parameters with which uint8 spans a range, extended to include 0."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / 255 or 1.0
        return cls(scale, round(-low / scale))


_FLOAT32 = QuantParams(1.0, 0)  # what the operators expect for an output in float32


def quantize_tensor(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Convert float32 to uint8, clipping what is out of range."""
    return torch.add(torch.tensor(zero_point + 0.5), x, alpha=1 / scale).clamp_(0, 255).to(torch.uint8)


def dequantize_tensor(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Convert uint8 to float32."""
    floats = x.to(torch.float32)
    return (floats.sub_(zero_point) if zero_point else floats).mul_(scale)


class QuantizedConv2d(nn.Module):
    """A fused convolution of uint8 tensors with int8 weights.

    Args:
        conv: The fused convolution in float32.
        input_params: Quantization of the input.
        other_params: Quantization of the tensor to add; None if there is none.
        output_params: Quantization of the output; None for an output in float32.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero: Tensor
    bias: Tensor

    def __init__(
        self,
        conv: OneDNNConv2d,
        input_params: QuantParams,
        other_params: QuantParams | None,
        output_params: QuantParams | None,
    ) -> None:
        super().__init__()
        largest = conv.weight.abs().amax((1, 2, 3)).clamp_min(torch.finfo(torch.float32).tiny)
        scale = largest / 127
        self.register_buffer("weight", (conv.weight / scale[:, None, None, None]).round().to(torch.int8).contiguous())
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_zero", torch.zeros(len(scale), dtype=torch.int32))
        self.register_buffer("bias", conv.bias.clone())
        padding, stride, dilation, groups = conv.geometry
        self.geometry = (stride, padding, dilation, groups)  # in the order of the quantized operators
        self.input_params, self.other_params, self.output_params = input_params, other_params, output_params
        self.relu, self.overwrite = conv.relu, conv.overwrite

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Convolve uint8 ``(N, in_channels, H, W)``, and add uint8 broadcastable to ``(N, out_channels, H', W')``."""
        return self._bind(x, other, None)(x, other)

    def prepack(self, x: Tensor, other: Tensor | None) -> ConvCall:
        """Return a call for inputs of these shapes, with weights reordered for them."""
        return self._bind(x, other, list(x.shape))

    def _bind(self, x: Tensor, other: Tensor | None, shape: list[int] | None) -> ConvCall:
        """Return the operator for such inputs with all arguments bound that are the same in every call."""
        operators: Any = torch.ops.onednn
        packed = operators.qconv_prepack(self.weight, self.weight_scale, *self.input_params, *self.geometry, shape)
        weights = (*self.input_params, packed, self.weight_scale, self.weight_zero)
        to_float32 = (self.bias, *self.geometry, *_FLOAT32, torch.float32)
        output = to_float32
        if self.output_params is not None:
            output = (self.bias, *self.geometry, *self.output_params, torch.uint8)
        relu = "relu" if self.relu else "none"
        other_params, output_params, overwrite = self.other_params, self.output_params, self.overwrite

        def convolve(x: Tensor, other: Tensor | None = None) -> Tensor:
            x = x.contiguous(memory_format=torch.channels_last)
            out: Tensor
            if other is None or other_params is None:
                out = operators.qconv_pointwise(x, *weights, *output, relu, [None], "")
            else:  # the operator always adds in place
                total = other if overwrite else other.clone()
                total = total.contiguous(memory_format=torch.channels_last)
                out = operators.qconv2d_pointwise.binary(
                    x, *weights, total, *output, *other_params, "sum", 1.0, relu, [None], ""
                )
            return out

        def convolve_and_broadcast(x: Tensor, other: Tensor) -> Tensor:  # no quantized operator adds by broadcasting
            assert other_params is not None
            assert output_params is not None
            x = x.contiguous(memory_format=torch.channels_last)
            out = operators.qconv_pointwise(x, *weights, *to_float32, "none", [None], "")
            out = out + dequantize_tensor(other, *other_params)
            return quantize_tensor(out.relu_() if self.relu else out, *output_params)

        stride, padding, dilation, _ = self.geometry
        broadcasts = other is not None and other.shape != output_shape(x, self.weight, padding, stride, dilation)
        return convolve_and_broadcast if broadcasts else convolve

    def extra_repr(self) -> str:
        """Show the weight's shape and what is fused in ``repr``."""
        return f"{tuple(self.weight.shape)}, relu={self.relu}, overwrite={self.overwrite}"
