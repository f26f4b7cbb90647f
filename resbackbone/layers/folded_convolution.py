"""A convolution with a frozen norm folded into it, as one convolution that trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resbackbone.layers.memory_format import is_channels_last, map_to_contiguous, to_output_format
from resbackbone.utils import processor

# PyTorch 2.13's own convolutions of 1x1 pixels and stride 2, over fewer channels than this in channels_last, write past
# the end of their weight's gradient on CPUs with AVX-512. What they get from here is not in channels_last.
_NARROW = 16
Ints = Sequence[int]
Geometry = tuple[Any, Any, Any, int]  # stride, padding, dilation, groups, as a convolution takes them


def convolve_folded(
    x: Tensor, conv: nn.Conv2d, norm: Any, dilation: int | None = None, shortcut: Tensor | None = None
) -> Tensor:
    """Compute ``norm(conv(x)) + shortcut`` with the norm folded into the weights, ``weight * s``, and the bias ``t``.

    ``s = gamma / sqrt(var + eps)`` and ``t = beta + (bias - mean) * s``. Gradients go to what the two layers have; of
    feature maps only ``x`` is kept for the backward pass, which folds the weights again.

    Args:
        x: ``(N, in_channels, H, W)``. On a CPU the computation is in channels_last, whatever ``x`` is.
        conv: A plain convolution, or one that standardizes its weights.
        norm: A batch norm that normalizes by its running statistics.
        dilation: In place of the convolution's dilation and padding, in pixels.
        shortcut: ``(N, out_channels, H', W')``; None for nothing.

    Returns:
        ``(N, out_channels, H', W')``.

    Source: You et al., Efficient ConvBN Blocks for Transfer Learning and Beyond, arXiv:2305.11624, section 3, "tune
    mode".
    """
    standardized = getattr(conv, "standardized_weight", None)
    weight = conv.weight if standardized is None else standardized()
    padding, dilated = (conv.padding, conv.dilation) if dilation is None else ((dilation,) * 2, (dilation,) * 2)
    mean, var = norm.running_mean, norm.running_var
    gamma = torch.ones_like(var) if norm.weight is None else norm.weight
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias
    x, shortcut = _enter(x), None if shortcut is None else _enter(shortcut)
    tensors = (x, weight, conv.bias, gamma, beta, mean, var, shortcut)
    geometry = (conv.stride, padding, dilated, conv.groups)
    if torch.compiler.is_compiling():  # the compiler takes derivatives itself, and chooses what is kept
        return _convolve(*tensors, norm.eps, geometry)
    out: Tensor = _FoldedConvolution.apply(*tensors, norm.eps, geometry)  # type: ignore[no-untyped-call]
    return to_output_format(out) if out.shape[1] < _NARROW else out


def _enter(x: Tensor) -> Tensor:
    """Bring a feature map into the precision that is computed in."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype is not torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def _lay_out_input(x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[Tensor, Geometry]:
    """Bring what is convolved on a CPU into channels_last; of what is contiguous, only the pixels that are seen."""
    stride, padding, dilation, groups = geometry
    if weight.shape[2:] == (1, 1) and padding == (0, 0) and not x.is_contiguous(memory_format=torch.channels_last):
        x, geometry = x[..., :: stride[0], :: stride[1]], ((1, 1), padding, dilation, groups)
    return x.contiguous(memory_format=torch.channels_last), geometry


def _scales(gamma: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The inverse of the deviation, and ``s``; in single precision at least."""
    wide = torch.promote_types(var.dtype, torch.float32)
    inverse = (var.to(wide) + eps).rsqrt()
    return inverse, inverse * gamma


def _fold(weight: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    folded = (weight * scale.view(-1, 1, 1, 1)).to(x.dtype)
    return folded.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else folded


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    var: Tensor,
    shortcut: Tensor | None,
    eps: float,
    geometry: Geometry,
) -> Tensor:
    _, scale = _scales(gamma, var, eps)
    shift = beta + (-mean if bias is None else bias - mean) * scale
    folded, shift = _fold(weight, scale, x), shift.to(x.dtype)
    if x.device.type == "cpu":
        x, geometry = _lay_out_input(x, folded, geometry)
        shortcut = None if shortcut is None else shortcut.contiguous(memory_format=torch.channels_last)
    if shortcut is None:
        return F.conv2d(x, folded, shift, *geometry)
    if not _can_add(x, shortcut, folded, geometry):
        return F.conv2d(x, folded, shift, *geometry).add_(shortcut)
    stride, padding, dilation, groups = geometry
    out: Tensor = torch.ops.mkldnn._convolution_pointwise.binary(
        *(x, shortcut, folded, shift, padding, stride, dilation, groups), *("add", 1.0, None, [], None)
    )
    return out


def _can_add(x: Tensor, shortcut: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Return whether oneDNN adds a shortcut to what it convolves; it neither spreads nor converts it."""
    stride, padding, dilation, _ = geometry
    if shortcut.shape != output_shape(x, weight, padding, stride, dilation) or shortcut.dtype is not x.dtype:
        return False
    if x.device.type != "cpu" or not x.numel() or torch.compiler.is_compiling() or not torch.backends.mkldnn.enabled:
        return False
    return x.dtype in (torch.float32, torch.bfloat16) and processor.computes_natively(x.dtype)


def output_shape(x: Tensor, weight: Tensor, padding: Ints, stride: Ints, dilation: Ints) -> tuple[int, ...]:
    """Return the shape of what a convolution makes of a tensor."""
    sides = [
        (side + 2 * p - d * (k - 1) - 1) // s + 1
        for side, k, p, s, d in zip(x.shape[2:], weight.shape[2:], padding, stride, dilation, strict=True)
    ]
    return (x.shape[0], weight.shape[0], *sides)


class _FoldedConvolution(torch.autograd.Function):
    """``_convolve``, which as a graph of its parts would keep the folded weights."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return _convolve(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, weight, bias, gamma, _, mean, var, _, ctx.eps, ctx.geometry = inputs
        ctx.save_for_backward(x, weight, bias, gamma, mean, var)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, gamma, mean, var = ctx.saved_tensors
        of_x, of_weight, of_bias, of_gamma, of_beta, _, _, of_shortcut, *_ = ctx.needs_input_grad
        inverse, scale = _scales(gamma, var, ctx.eps)
        # Whoever goes backward under autocast means the forward pass, which is over.
        with torch.autocast(x.device.type, enabled=False):
            grad_x, grad_folded = _differentiate(
                grad, x, _fold(weight, scale, x), ctx.geometry, of_x=of_x, of_weight=of_weight or of_gamma
            )
            grads: list[Any] = [grad_x, None, None, None, None]
            if grad_x is not None and not is_channels_last(x):  # sums of gradients in several formats are slow
                grads[0] = map_to_contiguous(grad_x)
            if of_bias or of_gamma or of_beta:
                # Row by row first: asked for another precision at once, PyTorch would convert the whole map.
                grad_shift = grad.permute(0, 2, 3, 1).sum(2).to(scale.dtype).sum((0, 1))
                grads[2] = grad_shift * scale if of_bias else None
                grads[4] = grad_shift if of_beta else None
            if grad_folded is not None:
                grad_folded = grad_folded.to(scale.dtype)
                if of_gamma:
                    offset = -mean if bias is None else bias - mean
                    grads[3] = ((grad_folded * weight).sum((1, 2, 3)) + offset * grad_shift) * inverse
                if of_weight:
                    spread = scale.view(-1, 1, 1, 1)
                    grads[1] = grad_folded * spread if torch.is_grad_enabled() else grad_folded.mul_(spread)
        return (*grads, None, None, grad if of_shortcut else None, None, None)


def _differentiate(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, *, of_x: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of a convolution's input and weight, of those that are wanted."""
    stride, padding, dilation, groups = geometry
    if x.device.type == "cpu" and weight.shape[2:] == (1, 1) and padding == (0, 0) and groups == 1:
        return _differentiate_1x1(grad, x, weight, stride, of_x=of_x, of_weight=of_weight)
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        # Not the bias's gradient: oneDNN computes that of the weight more slowly with it.
        *(grad, x, weight, None, stride, padding, dilation, False, (0, 0), groups, (of_x, of_weight, False))
    )
    return grad_x, grad_weight


def _differentiate_1x1(
    grad: Tensor, x: Tensor, weight: Tensor, stride: tuple[int, int], *, of_x: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The same by matrix products, which are faster on CPUs: in channels_last a pixel is a row."""
    seen = (..., slice(None, None, stride[0]), slice(None, None, stride[1]))
    grad_x = grad_weight = None
    if of_x:
        grad_x = (_rows(grad) @ weight.flatten(1)).view(grad.shape[0], *grad.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
        if stride != (1, 1):
            of_seen, grad_x = grad_x, torch.zeros_like(x, memory_format=torch.channels_last)
            grad_x[seen] = of_seen
    if of_weight:
        # With the weight's strides even where a side of 1 pixel allows others: DistributedDataParallel warns of those.
        grad_weight = (_rows(grad).t() @ _rows(x[seen])).as_strided(weight.shape, weight.stride())
    return grad_x, grad_weight


def _rows(x: Tensor) -> Tensor:
    """View ``(N, C, H, W)`` as ``(N * H * W, C)``; copy it, if it is in another format than channels_last."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)
