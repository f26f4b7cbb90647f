"""The blocks of SKNet: a selective-kernel convolution in the place of the one that may stride."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from resbackbone.blocks.base import ResidualBlock
from resbackbone.blocks.basic import BasicBlock
from resbackbone.blocks.bottleneck import Bottleneck
from resbackbone.blocks.resnext import ResNeXtBottleneck
from resbackbone.layers.module import Config
from resbackbone.layers.selective_kernel import SelectiveKernelConv2d


class SelectiveKernelBlock(ResidualBlock):
    """What puts a selective-kernel convolution into a block; named before the block class among a class's bases.

    The convolution holds its norms: there is none of its number in the block. Where it is the one that ``dcn``
    replaces, all of its paths are deformable.

    Args:
        args: As for the block class.
        num_paths: As for :class:`~resbackbone.layers.SelectiveKernelConv2d`.
        reduction: As for :class:`~resbackbone.layers.SelectiveKernelConv2d`.
        min_channels: As for :class:`~resbackbone.layers.SelectiveKernelConv2d`.
        split_input: As for :class:`~resbackbone.layers.SelectiveKernelConv2d`.
        kwargs: As for the block class.

    Source: Li et al., Selective Kernel Networks, arXiv:1903.06586, section 3.2.
    """

    selective_index: ClassVar[int]  # which convolution it is, counted from 1

    def __init__(
        self,
        *args: Any,
        num_paths: int = 2,
        reduction: int = 16,
        min_channels: int = 32,
        split_input: bool = False,
        **kwargs: Any,
    ) -> None:
        self.selective: Config = {
            "num_paths": num_paths,
            "reduction": reduction,
            "min_channels": min_channels,
            "split_input": split_input,
        }
        super().__init__(*args, **kwargs)

    def add_conv(
        self,
        index: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        deformable: bool = False,
        **kwargs: Any,
    ) -> None:
        """Add ``conv{index}`` and its norm, or the selective-kernel convolution."""
        if index != self.selective_index:
            super().add_conv(index, in_channels, out_channels, kernel_size, deformable=deformable, **kwargs)
            return
        conv_cfg = self.spatial_conv_cfg(kwargs["stride"]) if deformable else self.conv_cfg
        del kwargs["padding"]  # as far as each path looks
        conv = SelectiveKernelConv2d(
            in_channels, out_channels, conv_cfg=conv_cfg, norm_cfg=self.norm_cfg, **self.selective, **kwargs
        )
        self.add_module(f"conv{index}", conv)

    def step(self, index: int, x: Tensor) -> Tensor:
        """Run the ``index``-th convolution with its norm and ReLU; the selective one brings its own."""
        return self.get_submodule(f"conv{index}")(x) if index == self.selective_index else super().step(index, x)


class SelectiveKernelBasicBlock(SelectiveKernelBlock, BasicBlock):
    """A :class:`~resbackbone.blocks.BasicBlock` whose first convolution selects."""

    selective_index: ClassVar[int] = 1


class SelectiveKernelBottleneck(SelectiveKernelBlock, Bottleneck):
    """A :class:`~resbackbone.blocks.Bottleneck` whose 3x3 selects."""

    selective_index: ClassVar[int] = 2


class SelectiveKernelResNeXtBottleneck(SelectiveKernelBlock, ResNeXtBottleneck):
    """A :class:`~resbackbone.blocks.ResNeXtBottleneck` whose 3x3 selects, as in the paper."""

    selective_index: ClassVar[int] = 2
