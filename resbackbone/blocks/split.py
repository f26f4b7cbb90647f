"""The block of ResNeSt: a bottleneck whose 3x3 is a split-attention convolution."""

from __future__ import annotations

from typing import ClassVar

from torch import nn
from typing_extensions import Unpack

from resbackbone.blocks.base import GroupOptions
from resbackbone.blocks.bottleneck import Bottleneck
from resbackbone.layers import SplitAttentionConv2d


class SplitAttentionBottleneck(Bottleneck):
    """A bottleneck with split attention in its middle.

    ``conv2`` has its norms inside; there is no ``norm2``. ``dcn`` makes the convolution inside ``conv2`` deformable.

    Args:
        inplanes: Input channels.
        planes: A quarter of the output channels.
        radix: As for :class:`~resbackbone.layers.SplitAttentionConv2d`.
        reduction_factor: As for :class:`~resbackbone.layers.SplitAttentionConv2d`.
        avg_down_stride: Stride in a 3x3 average pooling after (with ``avd_first``, before) ``conv2`` instead of in it.
        avd_first: Pool in front of ``conv2``, the paper's "fast" setting, instead of behind it.
        options: As for :class:`~resbackbone.blocks.Bottleneck`.

    Source: Zhang et al., ResNeSt: Split-Attention Networks, arXiv:2004.08955, figure 2; pooling is section 3.2.
    """

    unsupported: ClassVar[tuple[str, ...]] = ("anti_aliasing", "ibn")

    def __init__(
        self,
        inplanes: int,
        planes: int,
        *,
        radix: int = 2,
        reduction_factor: int = 4,
        avg_down_stride: bool = True,
        avd_first: bool = False,
        **options: Unpack[GroupOptions],
    ) -> None:
        self.radix = radix
        self.reduction_factor = reduction_factor
        self.avg_down_stride = avg_down_stride
        self.avd_first = avd_first
        super().__init__(inplanes, planes, **options)
        if self.avd_layer is not None:
            if avd_first:
                self.after_conv1_plugin_names = [*self.after_conv1_plugin_names, "avd_layer"]
            else:
                self.after_conv2_plugin_names = ["avd_layer", *self.after_conv2_plugin_names]

    def add_spatial_conv(self, channels: int, stride: int, dilation: int) -> None:
        """Add ``conv2``, the split attention, and ``avd_layer``, the pooling that strides in its place."""
        pools = self.avg_down_stride and stride > 1
        conv_stride = 1 if pools else stride
        self.conv2 = SplitAttentionConv2d(
            *(channels, channels, 3),
            stride=conv_stride,
            padding=dilation,
            dilation=dilation,
            groups=self.groups,
            radix=self.radix,
            reduction_factor=self.reduction_factor,
            conv_cfg=self.spatial_conv_cfg(conv_stride),
            norm_cfg=self.norm_cfg,
        )
        self.avd_layer = nn.AvgPool2d(3, stride, padding=1) if pools else None
