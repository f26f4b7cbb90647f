"""The outputs of an exported model: names, channels and strides of its feature maps, and how it is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resbackbone.backbones.base import Backbone
from resbackbone.backbones.feature_info import FeatureInfo
from resbackbone.inference.copying import copy_for_inference
from resbackbone.inference.engines import Optimized

# Of the images that strides are read off; the second where they must be computed.
_SIDE, _SMALL_SIDE = 1024, 256


class FeatureMaps(nn.Module):
    """What a model computes, as a tuple of tensors: images ``(N, in_channels, H, W)`` to one entry for each level.

    Of a detector or segmentor these are the maps behind its neck, or behind its backbone where it has no neck.

    Args:
        net: A backbone, a model that calls one, or a detector with a ``backbone``.

    Raises:
        ValueError: If it holds no backbone, or one that `optimize` or `quantize` returned.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.in_channels = backbone_of(net).in_channels
        self.chain = nn.Sequential(*_before_heads(net, self.in_channels))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the levels."""
        return tuple(tensor for _, tensor in flatten(self.chain(images)))


def _before_heads(net: nn.Module, in_channels: int) -> list[nn.Module]:
    """Return the parts of a detector that compute its feature maps; of another model, all of it."""
    backbone = getattr(net, "backbone", None)
    if not isinstance(backbone, nn.Module):
        return [net]
    # `extract_feat` is OpenMMLab's name for what comes before the heads. Others show it by what they return.
    if not (hasattr(net, "extract_feat") or hasattr(net, "neck")) and _returns_maps(net, in_channels):
        return [net]
    neck = getattr(net, "neck", None)
    return [backbone, neck] if isinstance(neck, nn.Module) else [backbone]


def backbone_of(net: nn.Module) -> Backbone:
    """Return the first backbone in a model."""
    if any(isinstance(module, Optimized) for module in net.modules()):
        raise ValueError(
            f"{type(net).__name__} is or holds what `optimize` or `quantize` returned, which cannot be exported; "
            "export the original"
        )
    for module in net.modules():
        if isinstance(module, Backbone):
            return module
    raise ValueError(f"`net` must be a backbone or hold one, got {type(net).__name__}")


def flatten(outs: Any) -> list[tuple[str | None, Tensor]]:
    """Return the tensors of a model's output, with their names where it is a dict.

    Raises:
        ValueError: If it is neither a tensor, nor a sequence or a dict of such.
    """
    if isinstance(outs, Tensor):
        return [(None, outs)]
    if isinstance(outs, Mapping):
        named = [(str(key), value) for key, value in outs.items() if value is not None]
        if all(isinstance(value, Tensor) for _, value in named):
            return [(name, value) for name, value in named]
        if len(named) == 1:  # as the feature maps of a transformers backbone
            return flatten(named[0][1])
    elif isinstance(outs, (tuple, list)) and all(isinstance(out, Tensor) for out in outs):
        return [(None, out) for out in outs]
    raise ValueError(f"a model must return a tensor, or a tuple, list or dict of them, got {type(outs).__name__}")


def read_levels(net: nn.Module, model: FeatureMaps) -> tuple[FeatureInfo, ...]:
    """Return what the outputs are, in order.

    Their names are the keys of a dict, the backbone's where they have its channels and strides, or p2 for stride 4, p3
    for stride 8 and so on. What has no height and width, as logits, has stride 0.

    Args:
        net: What was given.
        model: How it is called.
    """
    outs, side = _probe(model.chain if len(model.chain) > 1 else model.chain[0], model.in_channels)
    shapes = [(out.shape[1], _stride(out, side)) for _, out in outs]
    given = [name for name, _ in outs]
    infos = backbone_of(net).feature_info
    if not any(given) and shapes == [(info.channels, info.stride) for info in infos]:
        return infos
    names = _names(given, [stride for _, stride in shapes])
    return tuple(
        FeatureInfo(name, index, *shape) for index, (name, shape) in enumerate(zip(names, shapes, strict=True))
    )


def _names(given: Sequence[str | None], strides: Sequence[int]) -> Sequence[str]:
    named = [name for name in given if name is not None]
    if len(named) == len(strides):
        return named
    if list(strides) == [0]:
        return ["logits"]
    by_stride = [f"p{stride.bit_length() - 1}" for stride in strides if stride and stride & (stride - 1) == 0]
    return by_stride if len(set(by_stride)) == len(strides) else [f"out{index}" for index in range(len(strides))]


def _stride(out: Tensor, side: int) -> int:
    return max(1, round(side / out.shape[2])) if out.dim() == 4 else 0


def _probe(net: nn.Module, in_channels: int) -> tuple[list[tuple[str | None, Tensor]], int]:
    """Run a model on one image, without computing anything if its layers allow it; return the outputs, and the side.

    Raises:
        ValueError: If the model does not run on images, or returns something else.
    """
    for device, side in (("meta", _SIDE), ("cpu", _SMALL_SIDE)):
        copied = copy_for_inference(net).float().to(device)
        try:
            with torch.no_grad():
                outs = copied(torch.zeros(1, in_channels, side, side, device=device))
            return flatten(outs), side
        except Exception as error:  # of a layer that computes with numbers, which have no end of classes
            reason = error
    raise ValueError(f"{type(net).__name__} does not run on images (1, {in_channels}, {side}, {side}): {reason}")


def _returns_maps(net: nn.Module, in_channels: int) -> bool:
    try:
        return bool(_probe(net, in_channels)[0])
    except ValueError:
        return False
