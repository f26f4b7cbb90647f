"""Count parameters and multiply-accumulates of a backbone on the meta device."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resbackbone.backbones import Backbone
from resbackbone.backbones.base import total_stride
from resbackbone.backbones.shapes import shapes_only
from resbackbone.config import BackboneSource, construct_backbone
from resbackbone.layers import DeformConv2d, SAConv2d
from resbackbone.utils.validation import check_int, check_ints, check_type

NUM_CLASSES = 1000  # ImageNet-1k, for which figures are published

_COUNTED = (nn.Conv2d, nn.Linear, DeformConv2d)


@dataclass(frozen=True)
class PartCost:
    """Cost and output shape of one part of a backbone.

    Attributes:
        name: ``"stem"`` (all layers outside the stages), ``"layer1"``, ... If the stem's output precedes its pooling,
            ``"maxpool"`` is a separate part.
        channels: Output channels.
        stride: Output stride in input pixels.
        height: Height of the output in feature pixels.
        width: Width of the output in feature pixels.
        params: Number of parameters, including frozen ones, without running statistics.
        macs: Multiply-accumulates of convolutions (including deformable ones, without interpolation) and linear layers
            for one image; norms, activations, pooling and attention are not counted, as in published figures.
    """

    name: str
    channels: int
    stride: int
    height: int
    width: int
    params: int
    macs: int


@dataclass(frozen=True)
class Complexity:
    """Cost of a backbone, alone and with a 1000-class classifier (average pooling and a linear layer).

    Attributes:
        parts: The stem and the stages, in execution order.
    """

    parts: tuple[PartCost, ...]

    @property
    def params(self) -> int:
        """Parameters of the backbone."""
        return sum(part.params for part in self.parts)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the backbone for one image."""
        return sum(part.macs for part in self.parts)

    @property
    def params_with_classifier(self) -> int:
        """Parameters of the backbone with the classifier, as published."""
        return self.params + self.parts[-1].channels * NUM_CLASSES + NUM_CLASSES

    @property
    def macs_with_classifier(self) -> int:
        """Multiply-accumulates of the backbone with the classifier for one image, as published."""
        return self.macs + self.parts[-1].channels * NUM_CLASSES


def build_on_meta(config: BackboneSource) -> Backbone:
    """Build a backbone on the meta device: no memory, no initialization, no download of pretrained weights.

    Args:
        config: As for :func:`resbackbone.build_backbone`, which documents the exceptions, too.

    Returns:
        The backbone on torch's meta device.
    """
    with torch.device("meta"):
        return construct_backbone(config)


def measure(net: Backbone, *, size: int | tuple[int, int] = 224) -> Complexity:
    """Count the cost of a backbone for one image.

    Args:
        net: The backbone, on any device; it is not modified.
        size: Side of the image in pixels, or (height, width).

    Returns:
        The cost of the stem and of every stage, including stages that are not outputs.

    Raises:
        TypeError, ValueError: If ``net`` is not a backbone of this library, or the size is invalid.

    >>> from resbackbone import build_backbone
    >>> measure(build_backbone("resnet18")).params_with_classifier
    11689512
    """
    check_type("net", net, Backbone, "a backbone of resbackbone")
    height, width = _pair(size)
    net = shapes_only(net)
    stem_out = (index for index in net.out_indices if index == "stem")
    net.out_indices = (*stem_out, *range(len(net.res_layers)))
    names = [*_pooling_behind_an_output(net), *net.res_layers]
    layers: list[nn.Module] = [getattr(net, name) for name in names]
    macs: Counter[nn.Module] = Counter()
    shapes: list[torch.Size] = []  # output shapes of the stem and each layer after it

    def count(module: Any, _: Any, out: Tensor) -> None:
        # Each output value takes in_channels / groups * height * width multiplications, or in_features.
        runs = 2 if isinstance(module, SAConv2d) else 1  # it convolves at two dilations
        macs[module] += runs * out.numel() * module.weight[0].numel()

    def note_shape(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        shapes.extend((out.shape,) if shapes else (inputs[0].shape, out.shape))

    for module in net.modules():
        if isinstance(module, _COUNTED):
            module.register_forward_hook(count)
    for layer in layers:
        layer.register_forward_hook(note_shape)
    with torch.inference_mode():
        net(torch.empty(1, net.in_channels, height, width, device="meta"))

    params = _with_stem(_num_params(net), [_num_params(layer) for layer in layers])
    all_macs = _with_stem(macs.total(), [sum(macs[module] for module in layer.modules()) for layer in layers])
    infos = zip(("stem", *names), _strides(net, names), shapes, params, all_macs, strict=True)
    return Complexity(tuple(PartCost(name, c, stride, h, w, p, m) for name, stride, (_, c, h, w), p, m in infos))


def _pooling_behind_an_output(net: Backbone) -> list[str]:
    """Return the name of the stem's pooling if the stem's output precedes it."""
    pooling = getattr(net, "maxpool", None)
    return [] if "stem" not in net.out_indices or isinstance(pooling, (nn.Identity, type(None))) else ["maxpool"]


def _num_params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _with_stem(total: int, layers: list[int]) -> list[int]:
    return [total - sum(layers), *layers]


def _strides(net: Backbone, names: list[str]) -> list[int]:
    """Return the output strides of the stem, of the pooling if it is a part, and of the stages."""
    stem = total_stride(child for name, child in net.named_children() if name not in names)
    pooled = [stem * total_stride([getattr(net, name)]) for name in names if name not in net.res_layers]
    return [stem, *pooled, *(info.stride for info in net.feature_info if info.name in net.res_layers)]


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(size, int):
        check_int("size", size, low=1)
        return size, size
    height, width = check_ints("size", size, low=1, length=2, why="height, width")
    return height, width
