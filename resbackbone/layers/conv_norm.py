"""A convolution and the norm behind it, as the one step that they are in every block, stem and shortcut."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from resbackbone.layers.folded_convolution import convolve_folded
from resbackbone.layers.memory_format import FormatKeeper
from resbackbone.layers.module import InitConfig, Module
from resbackbone.layers.norm import FrozenBatchNorm2d
from resbackbone.layers.tracing import is_recording, is_transformed
from resbackbone.layers.trident_conv import TridentConv2d
from resbackbone.layers.weight_standardization import ConvAWS2d, ConvWS2d
from resbackbone.utils.validation import warn_user

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# By what they do, not by class: a subclass that leaves it as it is will do. A norm that does something else, but not in
# eval mode, says so by a class attribute `plain_in_eval`.
_CONVOLUTIONS = {nn.Conv2d.forward, ConvWS2d.forward, ConvAWS2d.forward, TridentConv2d.forward}
_NORMS = {_BatchNorm.forward, nn.SyncBatchNorm.forward, FrozenBatchNorm2d.forward}


def conv_norm(
    x: Tensor, conv: nn.Module, norm: nn.Module, dilation: int | None = None, shortcut: Tensor | None = None
) -> Tensor:
    """Run a convolution and the norm behind it.

    Args:
        x: ``(N, in_channels, H, W)``.
        conv: The convolution. Where :func:`set_folding` asked it to, and the norm is frozen, both are one convolution.
        norm: Any layer behind it.
        dilation: What the convolution is called with, where it takes another dilation than its own.
        shortcut: ``(N, out_channels, H', W')``, added at the end.

    Returns:
        ``(N, out_channels, H', W')``.
    """
    if getattr(conv, "folds_norm", False) and _can_fold(x, conv, norm):
        return convolve_folded(x, conv, norm, dilation, shortcut)  # type: ignore[arg-type]
    out: Tensor = norm(conv(x) if dilation is None else conv(x, dilation))
    if shortcut is not None:
        out += shortcut
    return out


def set_folding(net: nn.Module, folding: bool) -> None:
    """Have the convolutions of a net fold the norms behind them, where :func:`conv_norm` runs both, or not."""
    if folding and not any(isinstance(layer, (_BatchNorm, FrozenBatchNorm2d)) for layer in net.modules()):
        warn_user(f"folding has no effect in a {type(net).__name__} without batch norms")
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.folds_norm = folding  # type: ignore[assignment]
        if isinstance(layer, FormatKeeper):
            layer.folds_norms = folding


def _can_fold(x: Any, conv: Any, norm: Any) -> bool:
    return (
        type(conv).forward in _CONVOLUTIONS
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and (type(norm).forward in _NORMS or vars(type(norm)).get("plain_in_eval", False))
        and stands_still(norm)
        and isinstance(x, Tensor)
        and x.dim() == 4
        and not x.is_meta
        and _fits(x, conv.weight)
        and not is_recording()
        and not is_transformed()
        and not _is_watched(conv, norm)
    )


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Return whether both have one precision, or autocast gives them one; elsewhere the convolution raises."""
    if x.dtype is weight.dtype:
        return True
    return torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype)


def stands_still(norm: nn.Module) -> bool:
    """Return whether a layer is a batch norm that only reads its statistics, which makes it an affine map."""
    if isinstance(norm, FrozenBatchNorm2d):
        return True
    return isinstance(norm, _BatchNorm) and not norm.training and norm.running_mean is not None


def _is_watched(*layers: nn.Module) -> bool:
    """Whether somebody relies on layers being called: by hooks, or by a forward pass put in their own one's place."""
    if _has_any_global_hook():  # type: ignore[no-untyped-call]
        return True
    return any("forward" in vars(layer) or any(getattr(layer, hooks) for hooks in _HOOKS) for layer in layers)


class Sequential(Module, nn.Sequential):
    """An ``nn.Sequential`` with an ``init_cfg``, which runs convolutions by :func:`conv_norm`."""

    def __init__(self, *modules: Any, init_cfg: InitConfig | None = None) -> None:
        Module.__init__(self, init_cfg)
        nn.Sequential.__init__(self, *modules)

    def forward(self, input: Any) -> Any:
        """Run the layers one after the other."""
        conv = None
        for layer in self:
            if conv is not None:
                input, conv = conv_norm(input, conv, layer), None
            elif isinstance(layer, nn.Conv2d):
                conv = layer
            else:
                input = layer(input)
        return input if conv is None else conv(input)
