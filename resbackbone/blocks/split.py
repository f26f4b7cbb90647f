"""The block of ResNeSt: a bottleneck whose 3x3 is a split-attention convolution."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from resbackbone.blocks.resnext import ResNeXtBottleneck
from resbackbone.layers import SplitAttentionConv2d


class SplitAttentionBottleneck(ResNeXtBottleneck):
    """A grouped bottleneck with split attention in its middle.

    ``conv2`` holds its norms; there is no ``norm2``. ``dcn`` makes the convolution inside ``conv2`` deformable.

    Args:
        inplanes: Channels that come in.
        planes: A quarter of the channels that go out.
        radix: As for :class:`~resbackbone.layers.SplitAttentionConv2d`.
        reduction_factor: As for :class:`~resbackbone.layers.SplitAttentionConv2d`.
        avg_down_stride: Stride by average pooling over 3x3 pixels beside ``conv2`` instead of in it.
        avd_first: Pool in front of ``conv2``, the paper's "fast" setting, instead of behind it.
        kwargs: As for :class:`~resbackbone.blocks.ResNeXtBottleneck`.

    Source: Zhang et al., ResNeSt: Split-Attention Networks, arXiv:2004.08955, figure 2; pooling is section 3.2.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        *args: Any,
        radix: int = 2,
        reduction_factor: int = 4,
        avg_down_stride: bool = True,
        avd_first: bool = False,
        **kwargs: Any,
    ) -> None:
        self.radix = radix
        self.reduction_factor = reduction_factor
        self.avg_down_stride = avg_down_stride
        self.avd_first = avd_first
        super().__init__(inplanes, planes, *args, **kwargs)

    def add_conv(
        self, index: int, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, **kwargs: Any
    ) -> None:
        """Add ``conv{index}`` and its norm, or the split attention with its pooling."""
        if index != 2:
            super().add_conv(index, in_channels, out_channels, kernel_size, stride=stride, **kwargs)
            return
        pools = self.avg_down_stride and stride > 1
        conv_stride = 1 if pools else stride
        del kwargs["deformable"]
        self.conv2 = SplitAttentionConv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=conv_stride,
            radix=self.radix,
            reduction_factor=self.reduction_factor,
            conv_cfg=self.spatial_conv_cfg(conv_stride),
            norm_cfg=self.norm_cfg,
            **kwargs,
        )
        self.avd_layer = nn.AvgPool2d(kernel_size, stride, padding=1) if pools else None

    def step(self, index: int, x: Tensor) -> Tensor:
        """Run the ``index``-th convolution with its norm and ReLU; the second brings its own."""
        if index != 2:
            return super().step(index, x)
        if self.avd_layer is not None and self.avd_first:
            x = self.avd_layer(x)
        x = self.conv2(x)
        if self.avd_layer is not None and not self.avd_first:
            x = self.avd_layer(x)
        return x
