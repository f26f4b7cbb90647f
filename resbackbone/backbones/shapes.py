"""The channels and strides of feature maps, measured on the meta device after layers were replaced."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

_SIDE = 4096  # pixels; so large that convolutions without padding hardly change the ratio of the sides
_GEOMETRY = ("stride", "kernel_size", "padding", "dilation", "ceil_mode", "out_channels", "scale_factor", "output_size")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
Net = TypeVar("Net", bound=nn.Module)


class MapShape(NamedTuple):
    """The channels and stride of a feature map, which are the same for every image.

    Attributes:
        channels: Its number of channels.
        stride: Input pixels per feature pixel.
    """

    channels: int
    stride: int


def fingerprint(named_parts: Iterable[tuple[str, nn.Module]]) -> str:
    """Return a hash of what determines the shapes of feature maps: classes, strides, shapes of weights.

    Copies and unpickled modules have the same hash.
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
    """Copy a model to the meta device, in eval mode, without copying its weights."""
    tensors: list[Tensor] = [*net.parameters(), *net.buffers()]
    for module in net.modules():
        tensors.extend(value for value in vars(module).values() if isinstance(value, Tensor))
    memo: dict[int, Any] = {id(tensor): tensor.detach().to("meta") for tensor in tensors}
    memo |= {id(parameter): nn.Parameter(parameter.detach().to("meta"), False) for parameter in net.parameters()}
    shapes = copy.deepcopy(net, memo)
    shapes.eval()  # not chained: mmdet's `train`, in a subclass, returns None
    modules: Iterable[Any] = shapes.modules()
    for module in modules:
        if hasattr(module, "backend"):
            module.backend = "torch"  # compiled deformable convolution does not run on the meta device
    return shapes


def measure_maps(
    steps: Sequence[Callable[[Tensor], Tensor]], layers: nn.Module, in_channels: int
) -> tuple[MapShape, ...] | None:
    """Run layers one after the other on an image on the meta device.

    Args:
        steps: The layers or functions.
        layers: A module with all of their layers, on the meta device; its hooks are removed.
        in_channels: Channels of the image.

    Returns:
        The shape of the feature map after each step; None if a step does not run on the meta device, or returns no
        feature map, or one of a few pixels, as global pooling does, which has no stride.
    """
    for module in layers.modules():
        for hooks in _HOOKS:
            getattr(module, hooks).clear()  # the user's, which must not see this run
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
    except Exception:  # of any kind, from a third-party layer
        return None
    return tuple(shapes)


def _dtype(net: nn.Module) -> torch.dtype:
    return next((tensor.dtype for tensor in net.parameters() if tensor.is_floating_point()), torch.get_default_dtype())
