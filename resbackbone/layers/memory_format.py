"""The memory format of feature maps: what is computed in channels_last inside is returned as it was asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from resbackbone.layers.tracing import is_recording, is_transformed


class _Calls(threading.local):
    inside = False  # whether a call is under way at whose end the format is restored
    contiguous = False  # whether what that one returns will be contiguous


_CALLS = _Calls()


def is_channels_last(x: object) -> bool:
    """Return whether a tensor is in channels_last and in no other format; one channel or one pixel is contiguous."""
    if not isinstance(x, Tensor) or x.dim() != 4 or x.layout is not torch.strided:
        return False
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def to_contiguous(outs: Any) -> Any:
    """Return the tensors in ``outs``, of any nesting, in the contiguous format."""
    return tree_map_only(Tensor, map_to_contiguous, outs)


def map_to_contiguous(x: Tensor) -> Tensor:
    """Return a feature map in the contiguous format; if it is large, faster than :meth:`torch.Tensor.contiguous`."""
    if x.is_contiguous() or torch.compiler.is_compiling() or is_recording() or not _is_faster_transposed(x):
        return x.contiguous()
    out: Tensor = _Transposed.apply(x)  # type: ignore[no-untyped-call]
    return out


def _is_faster_transposed(x: Tensor) -> bool:
    """Return whether transposing matrices, image by image, is faster than torch's copy, which misses the cache.

    Six times for 2x256x160x160 on one thread. Torch's copy is shared by the threads, that of a matrix is not.
    """
    fits = x.device.type == "cpu" and is_channels_last(x) and not x.is_conj() and not x.is_neg()
    return fits and x.shape[2] * x.shape[3] >= 1024 and x.shape[1] >= 16 and torch.get_num_threads() <= 4


class _Transposed(torch.autograd.Function):
    """A contiguous copy of a tensor in channels_last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for matrix, pixels in zip(out.flatten(2), x.permute(0, 2, 3, 1).flatten(1, 2), strict=True):
            matrix.copy_(pixels.t())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.contiguous(memory_format=torch.channels_last)  # what follows computes in


def to_output_format(x: Any) -> Any:
    """Return what becomes an output in its final format, before a layer that keeps its result for the backward pass.

    Converted at the end alone, it would be kept in both formats.
    """
    return map_to_contiguous(x) if _CALLS.contiguous and isinstance(x, Tensor) else x


def restore_format(net: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call what computes in channels_last, and return its feature maps as plain layers would.

    Many compiled operators, such as mmcv's RoIAlign, read what they get as contiguous, whatever it is.

    Args:
        net: Where it belongs. Weights in channels_last ask for outputs in channels_last.
        call: What computes; within another such call it is called and nothing else happens.
        args: Its arguments; an image or feature map in channels_last among them asks for outputs in channels_last.
        kwargs: Its keyword arguments.
    """
    if _CALLS.inside or is_recording() or is_transformed():
        return call(*args, **kwargs)
    asked = any(map(is_channels_last, (*tree_leaves((args, kwargs)), *net.parameters())))
    _CALLS.inside, _CALLS.contiguous = True, not asked
    try:
        outs = call(*args, **kwargs)
    finally:
        _CALLS.inside = _CALLS.contiguous = False
    return outs if asked else to_contiguous(outs)


class FormatKeeper(nn.Module):
    """A module that, while it folds norms, returns feature maps in the memory format that it would return without."""

    folds_norms = False  # set by `fold_frozen_norms`

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run :meth:`forward` with its hooks."""
        call = super().__call__
        return restore_format(self, call, args, kwargs) if self.folds_norms else call(*args, **kwargs)
