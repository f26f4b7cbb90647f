"""The memory format of feature maps: folding computes in channels_last, and outputs keep their format."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from resbackbone.layers.tracing import is_exporting, is_recording, is_tracing, is_transformed


class _Call(threading.local):
    """The outermost call of :func:`restore_format` that is under way in a thread.

    Attributes:
        contiguous: Whether its outputs will be contiguous; None outside of such a call.
    """

    contiguous: bool | None = None


CALL = _Call()


def is_channels_last(x: object) -> bool:
    """Return whether a tensor is in channels_last and not contiguous; with one channel or one pixel it is both."""
    if not isinstance(x, Tensor) or x.dim() != 4 or x.layout is not torch.strided:
        return False
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def to_contiguous(outs: Any) -> Any:
    """Return the tensors in ``outs``, of any nesting, in the contiguous format."""
    return tree_map_only(Tensor, map_to_contiguous, outs)


def map_to_contiguous(x: Tensor) -> Tensor:
    """Return a feature map in the contiguous format; if it is large, faster than :meth:`torch.Tensor.contiguous`.

    On few threads and a large map in channels_last, transposing matrices, image by image, is faster than torch's copy,
    which misses the cache: six times for 2x256x160x160 on one thread.
    """
    if x.is_contiguous() or torch.compiler.is_compiling() or is_exporting() or is_tracing():
        return x.contiguous()
    if (
        x.device.type == "cpu"
        and x.dim() == 4
        and x.shape[1] >= 16
        and x.shape[2] * x.shape[3] >= 1024
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_conj()
        and not x.is_neg()
        and torch.get_num_threads() <= 4
    ):
        out: Tensor = _Transposed.apply(x)  # type: ignore[no-untyped-call]
        return out
    return x.contiguous()


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
        return grad.contiguous(memory_format=torch.channels_last)  # the format of the layers before


def to_output_format(x: Tensor) -> Tensor:
    """Return a feature map in the format of the call's outputs, before a layer that keeps it for the backward pass.

    Converted at the end of the call alone, it would be kept in both formats.
    """
    return map_to_contiguous(x) if CALL.contiguous else x


def restore_format(net: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function that computes in channels_last, and return its feature maps in the format of plain layers.

    Many compiled operators, such as mmcv's RoIAlign, read every tensor as if it were contiguous.

    Args:
        net: The module that is called. Weights in channels_last ask for outputs in channels_last.
        call: The function; within another such call it is called and nothing else happens.
        args: Its arguments; an image or feature map in channels_last among them asks for outputs in channels_last.
        kwargs: Its keyword arguments.
    """
    if CALL.contiguous is not None or is_recording() or is_transformed():
        return call(*args, **kwargs)
    asked = False
    for tensor in (*tree_leaves((args, kwargs)), *net.parameters()):
        if isinstance(tensor, Tensor) and tensor.dim() == 4 and not tensor.is_contiguous() and is_channels_last(tensor):
            asked = True
            break
    CALL.contiguous = not asked
    try:
        outs = call(*args, **kwargs)
    finally:
        CALL.contiguous = None
    if asked:
        return outs
    if type(outs) is tuple:
        for out in outs:
            if not isinstance(out, Tensor) or not out.is_contiguous():
                break
        else:
            return outs
    return to_contiguous(outs)
