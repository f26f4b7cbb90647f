"""A convolution and the norm behind it: one after the other or, if the norm is frozen and folding is on, as one.

A batch norm that reads its running statistics is an affine map. Folded into the convolution it costs nothing:
the weight becomes ``weight * s`` and the bias ``beta + (bias - mean) * s``, with ``s = gamma / sqrt(var + eps)``.
:func:`fold_batch_norm` computes them for training and for inference.

Source: You et al., Efficient ConvBN Blocks for Transfer Learning and Beyond, arXiv:2305.11624, section 3, "tune mode".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from resbackbone.layers.frozen_batch_norm import FrozenBatchNorm2d
from resbackbone.layers.memory_format import CALL, is_channels_last, map_to_contiguous
from resbackbone.layers.tracing import is_exporting, is_tracing, is_transformed
from resbackbone.layers.trident_conv import TridentConv2d
from resbackbone.layers.weight_standardization import WeightStandardizedConv2d
from resbackbone.utils import processor
from resbackbone.utils.validation import warn_user

# What can be folded, by the forward pass, so that subclasses which inherit it can be as well. FOLDABLE_NORMS are affine
# maps in eval mode; a module with another such norm adds its forward pass.
FOLDABLE_CONVOLUTIONS: set[Any] = {
    nn.Conv2d.forward,
    WeightStandardizedConv2d.forward,
    TridentConv2d.forward,
}
FOLDABLE_NORMS: set[Any] = {_BatchNorm.forward, nn.SyncBatchNorm.forward, FrozenBatchNorm2d.forward}

# PyTorch 2.13's own convolutions of 1x1 pixels and stride 2, over fewer channels than this in channels_last, write past
# the end of their weight's gradient on CPUs with AVX-512. Feature maps of so few channels are returned contiguous.
_NARROW = 16


class ConvNormModule(nn.Module):
    """A module that runs each of its convolutions together with the norm behind it.

    Attributes:
        folds_norms: Whether frozen norms are folded into the convolutions; :func:`set_folding` switches it.
        is_output: Whether the backbone returns what the module computes. When folding, such a feature map is converted
            to the output's memory format before the last ReLU, which keeps its result for the backward pass.
    """

    folds_norms = False
    is_output = False

    def conv_norm(
        self, x: Tensor, conv: Any, norm: Any, shortcut: Tensor | None = None, dilation: int | None = None
    ) -> Tensor:
        """Compute ``norm(conv(x)) + shortcut``.

        When folding, a frozen batch norm is folded into the convolution, unless a hook, a tracer, an exporter or a
        transform of functorch expects the two layers to be called.

        Args:
            x: ``(N, in_channels, H, W)``.
            conv: The convolution.
            norm: The layer behind it, or the name of the attribute that has it; None for no norm.
            shortcut: ``(N, out_channels, H', W')``, or broadcastable to it; None for no sum.
            dilation: The dilation, and padding, that the convolution is called with, in pixels; None for its own.

        Returns:
            ``(N, out_channels, H', W')``.
        """
        if isinstance(norm, str):
            norm = getattr(self, norm)
        # Written out here and in FoldedConvNorm, since calls of functions would take as long as the small layers do.
        if (
            self.folds_norms
            and type(conv).forward in FOLDABLE_CONVOLUTIONS
            and conv.padding_mode == "zeros"
            and not isinstance(conv.padding, str)
            and norm is not None
            and type(norm).forward in FOLDABLE_NORMS
            and (not norm.training or isinstance(norm, FrozenBatchNorm2d))
            and norm.running_mean is not None
            and isinstance(x, Tensor)
            and x.dim() == 4
            and not x.is_meta
            and not (is_exporting() or is_tracing() or is_transformed() or _has_any_global_hook())  # type: ignore[no-untyped-call]
            and not (conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks or conv._backward_pre_hooks)
            and not (norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks)
            and not ("forward" in conv.__dict__ or "forward" in norm.__dict__)
        ):
            weight = conv.standardized_weight() if isinstance(conv, WeightStandardizedConv2d) else conv.weight
            autocast = torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype)
            if x.dtype is weight.dtype or autocast:  # else the convolution raises
                entering, added = x, shortcut
                if autocast:
                    dtype = torch.get_autocast_dtype(x.device.type)
                    entering, added = x.to(dtype), None if shortcut is None else shortcut.to(dtype)
                padding, dilated = (conv.padding, conv.dilation) if dilation is None else ((dilation,) * 2,) * 2
                geometry = (conv.stride, padding, dilated, conv.groups)
                inputs = (entering, weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
                if torch.compiler.is_compiling():  # the compiler differentiates, and chooses what is kept
                    return FoldedConvNorm.forward(None, *inputs, added, norm.eps, geometry)
                out: Tensor = FoldedConvNorm.apply(*inputs, added, norm.eps, geometry)  # type: ignore[no-untyped-call]
                if CALL.contiguous is None:  # called by itself
                    converts = not is_channels_last(x) and not is_channels_last(weight)
                else:
                    converts = CALL.contiguous and (out.shape[1] < _NARROW or (self.is_output and shortcut is not None))
                return map_to_contiguous(out) if converts else out
        out = conv(x) if dilation is None else conv(x, dilation)
        if norm is not None:
            out = norm(out)
        if shortcut is not None:
            out += shortcut
        return out


def set_folding(net: nn.Module, folding: bool) -> None:
    """Have every module of a net fold frozen norms into the convolutions before them, or not."""
    if folding and not any(isinstance(layer, (_BatchNorm, FrozenBatchNorm2d)) for layer in net.modules()):
        warn_user(f"folding has no effect in a {type(net).__name__} without batch norms")
    for module in net.modules():
        if isinstance(module, ConvNormModule):
            module.folds_norms = folding


def is_frozen(norm: nn.Module) -> bool:
    """Return whether a layer is a batch norm that reads its running statistics, which makes it an affine map."""
    if isinstance(norm, FrozenBatchNorm2d):
        return True
    return isinstance(norm, _BatchNorm) and not norm.training and norm.running_mean is not None


def fold_batch_norm(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return the weight and the bias of the convolution that equals a convolution and a frozen batch norm.

    They are computed in the precision of ``var``, but at least in float32.

    Args:
        weight: The convolution's, ``(out_channels, in_channels / groups, kH, kW)``.
        bias: The convolution's, ``(out_channels,)``; None for zeros. So are all that follow.
        gamma: The norm's weight; None for ones.
        beta: The norm's bias; None for zeros.
        mean: The running mean.
        var: The running variance.
        eps: Added to the variance.
    """
    scale = (var.to(torch.promote_types(var.dtype, torch.float32)) + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma
    shift = (-mean if bias is None else bias - mean) * scale
    if beta is not None:
        shift = beta + shift
    return weight * scale.view(-1, 1, 1, 1), shift


class FoldedConvNorm(torch.autograd.Function):
    """A convolution with a frozen batch norm folded into it, and a sum, with gradients for what the two layers have.

    For the backward pass it keeps only the input, and folds the weight once more; a graph of the single steps would
    keep the folded weight, too. On CPUs it computes in channels_last. Not for transforms of functorch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor,
        var: Tensor,
        shortcut: Tensor | None,
        eps: float,
        geometry: Any,
    ) -> Tensor:
        """Compute ``norm(conv(x)) + shortcut``; ``geometry`` is stride, padding, dilation, groups."""
        if ctx is not None:
            ctx.eps, ctx.geometry = eps, geometry
            ctx.save_for_backward(x, weight, bias, gamma, mean, var)
        folded, shift = fold_batch_norm(weight, bias, gamma, beta, mean, var, eps)
        folded, shift = folded.to(x.dtype), shift.to(x.dtype)
        stride, padding, dilation, groups = geometry
        if x.device.type == "cpu":
            folded = folded.contiguous(memory_format=torch.channels_last)
            if (
                folded.shape[2:] == (1, 1)
                and padding == (0, 0)
                and not x.is_contiguous(memory_format=torch.channels_last)
            ):
                x, stride = x[..., :: stride[0], :: stride[1]], (1, 1)  # convert only the pixels that are seen
            x = x.contiguous(memory_format=torch.channels_last)
            shortcut = None if shortcut is None else shortcut.contiguous(memory_format=torch.channels_last)
        if shortcut is None:
            return F.conv2d(x, folded, shift, stride, padding, dilation, groups)
        if (  # oneDNN can add what has the output's shape and dtype
            x.device.type == "cpu"
            and torch.backends.mkldnn.enabled
            and not torch.compiler.is_compiling()
            and x.numel() > 0
            and shortcut.dtype is x.dtype
            and (x.dtype is torch.float32 or (x.dtype is torch.bfloat16 and processor.computes_natively(x.dtype)))
            and shortcut.shape == (x.shape[0], folded.shape[0], *x.shape[2:])
            and stride == (1, 1)
            and 2 * padding[0] == dilation[0] * (folded.shape[2] - 1)
            and 2 * padding[1] == dilation[1] * (folded.shape[3] - 1)
        ):
            out: Tensor = torch.ops.mkldnn._convolution_pointwise.binary(
                *(x, shortcut, folded, shift, padding, stride, dilation, groups), *("add", 1.0, None, [], None)
            )
            return out
        return F.conv2d(x, folded, shift, stride, padding, dilation, groups).add_(shortcut)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Return the gradients of the inputs."""
        x, weight, bias, gamma, mean, var = ctx.saved_tensors
        of_x, of_weight, of_bias, of_gamma, of_beta, _, _, of_shortcut, *_ = ctx.needs_input_grad
        inverse = (var.to(torch.promote_types(var.dtype, torch.float32)) + ctx.eps).rsqrt()
        scale = inverse if gamma is None else inverse * gamma
        folded = (weight * scale.view(-1, 1, 1, 1)).to(x.dtype)
        if x.device.type == "cpu":
            folded = folded.contiguous(memory_format=torch.channels_last)
        # Autocast is for the forward pass only.
        with torch.autocast(x.device.type, enabled=False):
            grad_x, grad_folded = _differentiate(
                grad, x, folded, ctx.geometry, of_x=of_x, of_weight=of_weight or of_gamma
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
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Any, *, of_x: bool, of_weight: bool
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
