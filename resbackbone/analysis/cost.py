"""Count parameters and multiply-accumulates of each part of a backbone, without computing anything."""

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
class Part:
    """What one part of a backbone costs and hands on.

    Attributes:
        name: ``"stem"`` (whatever lies in no stage), ``"layer1"``, ... Where the stem's map is an output and is pooled
            afterwards, ``"maxpool"`` is a part of its own.
        channels: Channels that it hands on.
        stride: Input pixels per feature pixel at its output.
        height: Feature pixels, top to bottom.
        width: Feature pixels, left to right.
        params: Numbers that ``parameters()`` yields, frozen ones included, statistics not.
        macs: Multiply-accumulates of its convolutions (deformable ones too, without their interpolation) and linear
            layers for one image; norms, activations, pooling and attention are left out, as in published figures.
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
    """What a backbone costs, alone and below a classifier of 1000 classes (average pooling and a linear layer).

    Attributes:
        parts: The stem and each stage, in the order they run.
    """

    parts: tuple[Part, ...]

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
        """Parameters of the backbone and the classifier, the number that is published."""
        return self.params + self.parts[-1].channels * NUM_CLASSES + NUM_CLASSES

    @property
    def macs_with_classifier(self) -> int:
        """Multiply-accumulates of the backbone and the classifier for one image, the number that is published."""
        return self.macs + self.parts[-1].channels * NUM_CLASSES


def build_on_meta(config: BackboneSource) -> Backbone:
    """Build a backbone of shapes only: no memory, no initialization, no pretrained weights fetched.

    Args:
        config: As for :func:`resbackbone.build_backbone`, which says what is raised, too.

    Returns:
        The backbone on torch's meta device.
    """
    with torch.device("meta"):
        return construct_backbone(config)


def measure(net: Backbone, *, size: int | tuple[int, int] = 224) -> Complexity:
    """Count what a backbone costs for one image.

    Args:
        net: The backbone, on whatever device; it stays as it is.
        size: Side of the image in pixels, or (height, width).

    Returns:
        The cost of the stem and of each stage, whether they are outputs or not.

    Raises:
        TypeError, ValueError: If ``net`` is no backbone of this library, or the size no positive integer or pair.

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
    shapes: list[torch.Size] = []  # what the stem and each layer after it pass on

    def count(module: Any, _: Any, out: Tensor) -> None:
        # Each output number takes one kernel's worth: in_channels / groups * height * width, or in_features.
        runs = 2 if isinstance(module, SAConv2d) else 1  # that one convolves at two dilations
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
    return Complexity(tuple(Part(name, c, stride, h, w, p, m) for name, stride, (_, c, h, w), p, m in infos))


def _pooling_behind_an_output(net: Backbone) -> list[str]:
    """The name of the stem's pooling, if there is one and what it pools is an output."""
    pooling = getattr(net, "maxpool", None)
    return [] if "stem" not in net.out_indices or isinstance(pooling, (nn.Identity, type(None))) else ["maxpool"]


def _num_params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _with_stem(total: int, layers: list[int]) -> list[int]:
    return [total - sum(layers), *layers]


def _strides(net: Backbone, names: list[str]) -> list[int]:
    """The strides of the stem and, after it, of the pooling, if it is a part, and the stages."""
    stem = total_stride(child for name, child in net.named_children() if name not in names)
    pooled = [stem * total_stride([getattr(net, name)]) for name in names if name not in net.res_layers]
    return [stem, *pooled, *(info.stride for info in net.feature_info if info.name in net.res_layers)]


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(size, int):
        check_int("size", size, low=1)
        return size, size
    height, width = check_ints("size", size, low=1, length=2, why="height, width")
    return height, width
