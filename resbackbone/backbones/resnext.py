"""ResNeXt: grouped convolutions in the bottlenecks."""

from __future__ import annotations

from typing import Any, ClassVar

from resbackbone.backbones.resnet import ResNet
from resbackbone.registry import MODELS


@MODELS.register_module()
class ResNeXt(ResNet):
    """ResNet of depth 26, 50, 101 or 152 with grouped convolutions; ``groups`` is 1 unless given, as in mmdet.

    The arguments are those of :class:`~resbackbone.ResNet`. Most variants accept ``groups`` and ``base_width`` as well:
    ``ResNetAA(50, groups=32)`` is a ResNeXt that downsamples by low-pass filters.

    Source: Xie et al., Aggregated Residual Transformations for Deep Neural Networks, arXiv:1611.05431.

    >>> ResNeXt(50, groups=32, base_width=4).layer1[0].conv2
    Conv2d(128, 128, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=32, bias=False)
    """

    arch_settings: ClassVar[dict[int, tuple[Any, tuple[int, ...]]]] = {
        depth: ResNet.arch_settings[depth] for depth in (26, 50, 101, 152)
    }
