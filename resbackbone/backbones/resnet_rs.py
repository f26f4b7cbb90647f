"""ResNet-RS: ResNet-D with squeeze-and-excitation, a stem without pooling, and deeper middle stages."""

from __future__ import annotations

from typing import Any, ClassVar

from typing_extensions import Unpack

from resbackbone.backbones.options import GroupedResNetOptions
from resbackbone.backbones.resnet_v1 import ResNetV1d
from resbackbone.backbones.seresnet import SEResNet
from resbackbone.backbones.stem import conv_norm_relu
from resbackbone.blocks import Bottleneck
from resbackbone.layers import Sequential
from resbackbone.registry import MODELS
from resbackbone.utils.validation import convert_arguments


@MODELS.register_module()
class ResNetRS(SEResNet, ResNetV1d):
    """ResNet-D with squeeze-and-excitation, and a strided 3x3 convolution where other ResNets pool.

    That convolution, with its norm and ReLU, is called ``maxpool``, as what it replaces.

    Args:
        depth: 50, 101, 152, 200, 270, 350 or 420.
        se_ratio: Reduction ratio of squeeze-and-excitation; 4 here.
        options: As for :class:`~resbackbone.SEResNet` and :class:`~resbackbone.ResNetV1d`. The paper trains with
            ``drop_path_rate=0.1`` from depth 200 on, with none before.

    Raises:
        KeyError, TypeError, ValueError: As for :class:`~resbackbone.SEResNet`.

    Source: Bello et al., Revisiting ResNets: Improved Training and Scaling Strategies, arXiv:2103.07579, section 5.1
    for the architecture, appendix for the blocks per stage; timm's ``resnetrs50`` and its siblings.

    >>> ResNetRS(50).maxpool[0]
    Conv2d(64, 64, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), bias=False)
    """

    arch_settings: ClassVar[dict[int, tuple[Any, tuple[int, ...]]]] = {
        50: (Bottleneck, (3, 4, 6, 3)),
        101: (Bottleneck, (3, 4, 23, 3)),
        152: (Bottleneck, (3, 8, 36, 3)),
        200: (Bottleneck, (3, 24, 36, 3)),
        270: (Bottleneck, (4, 29, 53, 4)),
        350: (Bottleneck, (4, 36, 72, 4)),
        420: (Bottleneck, (4, 44, 87, 4)),
    }

    @convert_arguments
    def __init__(self, depth: int, *, se_ratio: int = 4, **options: Unpack[GroupedResNetOptions]) -> None:
        super().__init__(depth, se_ratio=se_ratio, **options)

    def _make_stem_layer(self, in_channels: int, stem_channels: int) -> None:
        """Add the stem and the convolution that strides in place of the max pooling."""
        super()._make_stem_layer(in_channels, stem_channels)
        self.maxpool = Sequential(*conv_norm_relu(stem_channels, stem_channels, self.conv_cfg, self.norm_cfg, stride=2))
