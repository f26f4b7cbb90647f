"""Blocks whose strided convolution does not stride: a low-pass filter behind its ReLU does."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from resbackbone.blocks.base import ResidualBlock
from resbackbone.blocks.basic import BasicBlock
from resbackbone.blocks.bottleneck import Bottleneck
from resbackbone.blocks.resnext import ResNeXtBottleneck
from resbackbone.layers.blur_pool import AntiAliasing, make_downsampling


class AntiAliased(ResidualBlock):
    """What makes a block anti-aliased; named before the block class among a class's bases.

    Args:
        args: As for the block class.
        anti_aliasing: The filter, as for :func:`~resbackbone.layers.blur_pool.make_downsampling`.
        kwargs: As for the block class.

    Source: Zhang, arXiv:1904.11486, section 3.3, equation 8.
    """

    def __init__(self, *args: Any, anti_aliasing: AntiAliasing = "blur", **kwargs: Any) -> None:
        self.anti_aliasing = anti_aliasing
        super().__init__(*args, **kwargs)

    def add_conv(self, index: int, in_channels: int, out_channels: int, *args: Any, **kwargs: Any) -> None:
        """Add ``conv{index}`` and the norm behind it, and what strides in the convolution's place."""
        stride = kwargs.pop("stride", 1)
        super().add_conv(index, in_channels, out_channels, *args, **kwargs)
        grows = 1 < self.stage_dilation != kwargs.get("dilation", self.stage_dilation)
        if stride > 1 or grows:
            self.add_module(f"low_pass{index}", make_downsampling(self.anti_aliasing, out_channels, stride))

    def step(self, index: int, x: Tensor) -> Tensor:
        """Run the ``index``-th convolution with what follows it, the filter included."""
        x = super().step(index, x)
        name = f"low_pass{index}"
        return getattr(self, name)(x) if hasattr(self, name) else x


class AntiAliasedBasicBlock(AntiAliased, BasicBlock):
    """An anti-aliased :class:`~resbackbone.blocks.BasicBlock`."""


class AntiAliasedBottleneck(AntiAliased, Bottleneck):
    """An anti-aliased :class:`~resbackbone.blocks.Bottleneck`."""


class AntiAliasedResNeXtBottleneck(AntiAliased, ResNeXtBottleneck):
    """An anti-aliased :class:`~resbackbone.blocks.ResNeXtBottleneck`."""
