"""The shapes of a backbone's maps as its layers are now, once some have been replaced or changed by hand."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

_SIDE = 4096  # pixels, so many that convolutions without padding hardly change the ratio of two sides
_GEOMETRY = ("stride", "kernel_size", "padding", "dilation", "ceil_mode", "out_channels", "scale_factor", "output_size")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
Net = TypeVar("Net", bound=nn.Module)


class MapShape(NamedTuple):
    """What is known of a map of any image.

    Attributes:
        channels: Its number of channels.
        stride: Input pixels per feature pixel.
    """

    channels: int
    stride: int


def fingerprint(named_parts: Iterable[tuple[str, nn.Module]]) -> str:
    """Return a text that changes with whatever of some layers decides about shapes: classes, strides, weights' shapes.

    It is the same for a copy, and for what was pickled and loaded.
    """
    digest = hashlib.sha256()
    for part_name, part in named_parts:
        for name, module in part.named_modules(prefix=part_name):
            own, weight = vars(module), module._parameters.get("weight")
            geometry = [own.get(key) for key in _GEOMETRY]
            shape = None if weight is None or weight.dim() < 2 else tuple(weight.shape)
            digest.update(repr((name, type(module).__qualname__, geometry, shape)).encode())
    return digest.hexdigest()


def shapes_only(net: Net) -> Net:
    """Copy a net onto the meta device, in eval mode, without copying its weights."""
    tensors: list[Tensor] = [*net.parameters(), *net.buffers()]
    for module in net.modules():
        tensors.extend(value for value in vars(module).values() if isinstance(value, Tensor))
    memo: dict[int, Any] = {id(tensor): tensor.detach().to("meta") for tensor in tensors}
    memo |= {id(parameter): nn.Parameter(parameter.detach().to("meta"), False) for parameter in net.parameters()}
    shapes = copy.deepcopy(net, memo)
    shapes.eval()  # whose value is None in a subclass with mmdet's `train`
    modules: Iterable[Any] = shapes.modules()
    for module in modules:
        if hasattr(module, "backend"):
            module.backend = "torch"  # compiled operators of deformable convolution want memory
    return shapes


def measure_maps(
    steps: Sequence[Callable[[Tensor], Tensor]], layers: nn.Module, in_channels: int
) -> tuple[MapShape, ...] | None:
    """Run layers one after the other on an image without memory.

    Args:
        steps: What is run: layers or functions.
        layers: Everything that they run, on the meta device; what is hooked to it is removed.
        in_channels: Channels of the image.

    Returns:
        The shape of the map after each step; None where a step does not run without memory, or returns no map, or one
        of a few pixels, as global pooling does, which has no stride.
    """
    for module in layers.modules():
        for hooks in _HOOKS:
            getattr(module, hooks).clear()  # they are somebody's, and would see this run
    shapes = []
    x = torch.empty(1, in_channels, _SIDE, _SIDE, device="meta", dtype=_dtype(layers))
    try:
        with torch.no_grad(), torch.device("meta"):
            for step in steps:
                x = step(x)
                _, channels, height, _ = x.shape
                if height < 16:
                    return None
                shapes.append(MapShape(channels, max(1, round(_SIDE / height))))
    except Exception:  # whatever a layer of somebody's raises
        return None
    return tuple(shapes)


def _dtype(net: nn.Module) -> torch.dtype:
    return next((tensor.dtype for tensor in net.parameters() if tensor.is_floating_point()), torch.get_default_dtype())
