"""ResNet-T: ResNet-D with a deep stem that widens in three steps."""

from __future__ import annotations

from typing import Any, ClassVar

from resbackbone.backbones.resnet import ResNet
from resbackbone.backbones.resnet_v1 import ResNetV1d
from resbackbone.blocks import BasicBlock, Bottleneck
from resbackbone.registry import MODELS
from resbackbone.utils.validation import check_int


@MODELS.register_module()
class ResNetT(ResNetV1d):
    """ResNet-D whose deep stem has 24, 32 and 64 channels in place of 32, 32 and 64.

    Args:
        depth: 10, of basic blocks, 14, of bottlenecks, or as for :class:`~resbackbone.ResNet`.
        options: As for :class:`~resbackbone.ResNetV1d`; ``stem_channels`` is at least 8 where the stem is deep. With
            ``groups=32`` it is timm's ``seresnext26t_32x4d``, less its attention.

    Raises:
        KeyError, TypeError, ValueError: As for :class:`~resbackbone.ResNetV1d`.

    Source: timm's ``resnet26t`` and its siblings (stem type "deep_tiered"). Gluon's ResNet-v1s is
    :class:`~resbackbone.ResNetV1c` with ``stem_channels=128``; a ResNet v2 with this stem, timm's ``resnetv2_50t``, has
    ``stem_channels=(24, 32, 64)``.

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
        if self.deep_stem_channels is None:
            check_int("stem_channels", stem_channels, low=8)
            self.deep_stem_channels = (stem_channels // 8 * 3, stem_channels // 2, stem_channels)
        super()._make_deep_stem(in_channels, stem_channels)
