"""ResNeSt: split attention in the bottlenecks of a ResNet-D."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from typing_extensions import Unpack

from resbackbone.backbones.options import GroupedResNetOptions
from resbackbone.backbones.resnet_v1 import ResNetV1d
from resbackbone.blocks.split import SplitAttentionBottleneck
from resbackbone.layers.arguments import MAX_PARTS
from resbackbone.registry import MODELS
from resbackbone.utils.validation import check_count, check_flag, check_int, convert_arguments


@MODELS.register_module()
class ResNeSt(ResNetV1d):
    """ResNet-D whose 3x3s are split-attention convolutions, which may have ``groups``.

    The published nets of depth 50 have ``stem_channels=64``, the deeper ones 128.

    Args:
        depth: 14, 26, 50, 101, 152, 200 or 269.
        radix: Splits of each group that the attention weighs against each other.
        reduction_factor: How many channels make one channel of the attention.
        avg_down_stride: Stride by average pooling over 3x3 pixels beside the split attention instead of in it.
        avd_first: Pool in front of the split attention, the paper's "fast" setting, instead of behind it.
        options: As for :class:`ResNetV1d`; ``groups`` is the paper's cardinality. ``norm_cfg`` must not be instance
            norm: it has one pixel to normalize in the attention.

    Raises:
        KeyError, TypeError, ValueError: As for :class:`ResNet`.

    Source: Zhang et al., ResNeSt: Split-Attention Networks, arXiv:2004.08955; defaults as in mmdet 3.3.0
    ``models/backbones/resnest.py``, depth 269 as in mmpretrain 1.2.0, 14 and 26 as in GluonCV.

    >>> net = ResNeSt(14, stem_channels=32)
    >>> net.layer1[0].conv2.conv.groups, net.layer2[0].avd_layer.stride
    (2, 2)
    """

    arch_settings: ClassVar[dict[int, tuple[Any, tuple[int, ...]]]] = {
        14: (SplitAttentionBottleneck, (1, 1, 1, 1)),
        26: (SplitAttentionBottleneck, (2, 2, 2, 2)),
        50: (SplitAttentionBottleneck, (3, 4, 6, 3)),
        101: (SplitAttentionBottleneck, (3, 4, 23, 3)),
        152: (SplitAttentionBottleneck, (3, 8, 36, 3)),
        200: (SplitAttentionBottleneck, (3, 24, 36, 3)),
        269: (SplitAttentionBottleneck, (3, 30, 48, 8)),
    }

    _sizes: ClassVar[tuple[str, ...]] = ("radix",)

    @convert_arguments
    def __init__(
        self,
        depth: int,
        *,
        radix: int = 2,
        reduction_factor: int = 4,
        avg_down_stride: bool = True,
        avd_first: bool = False,
        **options: Unpack[GroupedResNetOptions],
    ) -> None:
        check_count("radix", radix, most=MAX_PARTS)
        check_int("reduction_factor", reduction_factor, low=1)
        check_flag("avg_down_stride", avg_down_stride)
        check_flag("avd_first", avd_first)
        self.radix = radix
        self.reduction_factor = reduction_factor
        self.avg_down_stride = avg_down_stride
        self.avd_first = avd_first
        super().__init__(depth, **options)

    def make_res_layer(self, **kwargs: Any) -> nn.Module:
        """Make one stage of bottlenecks with split attention."""
        return super().make_res_layer(
            radix=self.radix,
            reduction_factor=self.reduction_factor,
            avg_down_stride=self.avg_down_stride,
            avd_first=self.avd_first,
            **kwargs,
        )
