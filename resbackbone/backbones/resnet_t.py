"""ResNet-T and its kin: nets with the shortcuts of ResNet-D and a deep stem that widens in three steps."""

from __future__ import annotations

from typing import Any, ClassVar

from resbackbone.backbones.resnet import ResNet
from resbackbone.backbones.resnet_v1 import ResNetV1d
from resbackbone.backbones.resnet_v2 import ResNetV2
from resbackbone.backbones.resnext import ResNeXt
from resbackbone.backbones.stem import make_deep_stem
from resbackbone.blocks import BasicBlock, Bottleneck
from resbackbone.registry import MODELS
from resbackbone.utils.validation import check_int


@MODELS.register_module()
class ResNetT(ResNetV1d):
    """ResNet-D whose deep stem has 24, 32 and 64 channels in place of 32, 32 and 64.

    Args:
        depth: 10, of basic blocks, 14, of bottlenecks, or as for :class:`~resbackbone.ResNet`.
        kwargs: As for :class:`~resbackbone.ResNetV1d`; ``stem_channels`` is at least 8 where the stem is deep.

    Raises:
        KeyError, TypeError, ValueError: As for :class:`~resbackbone.ResNetV1d`.

    Source: timm's ``resnet26t`` and its siblings (stem type "deep_tiered"). In the same notation ResNet-S, Gluon's v1s,
    is :class:`~resbackbone.ResNetV1c` with ``stem_channels=128``.

    >>> [ResNetT(26).stem[index].out_channels for index in (0, 3, 6)]
    [24, 32, 64]
    """

    arch_settings: ClassVar[dict[int, tuple[Any, tuple[int, ...]]]] = {
        10: (BasicBlock, (1, 1, 1, 1)),
        14: (Bottleneck, (1, 1, 1, 1)),
        **ResNet.arch_settings,
    }

    def _make_deep_stem(self, in_channels: int, stem_channels: int) -> None:
        """Add ``stem``, whose first convolution has three eighths of the channels."""
        check_int("stem_channels", stem_channels, low=8)
        self.stem = make_deep_stem(
            in_channels, stem_channels, self.conv_cfg, self.norm_cfg, first_channels=stem_channels // 8 * 3
        )


@MODELS.register_module()
class ResNeXtT(ResNetT, ResNeXt):
    """ResNeXt with the stem and the shortcuts of :class:`ResNetT`.

    Args:
        depth: As for :class:`~resbackbone.ResNeXt`.
        kwargs: As for :class:`ResNetT` and :class:`~resbackbone.ResNeXt`.

    Source: timm's ``seresnext26t_32x4d`` and ``ecaresnext26t_32x4d``, less their attention.
    """

    arch_settings = ResNeXt.arch_settings


@MODELS.register_module()
class ResNetV2T(ResNetV2, ResNetT):
    """ResNet v2 with the stem and the shortcuts of :class:`ResNetT`.

    Args:
        depth: As for :class:`~resbackbone.ResNetV2`.
        kwargs: As for :class:`~resbackbone.ResNetV2` and :class:`ResNetT`.

    Source: timm's ``resnetv2_50t``.
    """

    arch_settings = ResNetV2.arch_settings
