"""The blocks of SKNet: a selective-kernel convolution in the place of the one that may stride."""

from __future__ import annotations

from typing import ClassVar, TypedDict

from typing_extensions import Unpack

from resbackbone.blocks.base import GroupOptions, ResidualBlock
from resbackbone.blocks.basic import BasicBlock
from resbackbone.blocks.bottleneck import Bottleneck
from resbackbone.layers.selective_kernel import SelectiveKernelConv2d


class SelectiveKernelOptions(TypedDict, total=False):
    """The arguments of :class:`~resbackbone.layers.SelectiveKernelConv2d` that a block accepts."""

    num_paths: int
    reduction: int
    min_channels: int
    split_input: bool


class SelectiveKernelBlock(ResidualBlock):
    """The base class of blocks with a selective-kernel convolution, which has norms and activations of its own.

    If it is the convolution that ``dcn`` replaces, all of its paths are deformable.

    Args:
        inplanes: Input channels.
        planes: The block's width before expansion.
        selective_kernel: Arguments of the convolution: its ``num_paths``, ``reduction``, ``min_channels`` and
            ``split_input``.
        options: As for :class:`ResidualBlock`.

    Source: Li et al., Selective Kernel Networks, arXiv:1903.06586, section 3.2.
    """

    unsupported: ClassVar[tuple[str, ...]] = ("anti_aliasing", "ibn")

    def __init__(
        self,
        inplanes: int,
        planes: int,
        *,
        selective_kernel: SelectiveKernelOptions | None = None,
        **options: Unpack[GroupOptions],
    ) -> None:
        self.selective_kernel: SelectiveKernelOptions = selective_kernel or {}
        super().__init__(inplanes, planes, **options)


class SelectiveKernelBasicBlock(SelectiveKernelBlock, BasicBlock):
    """A :class:`~resbackbone.blocks.BasicBlock` whose first convolution is a selective-kernel convolution."""

    def _build(self) -> None:
        self.conv1 = SelectiveKernelConv2d(
            self.inplanes,
            self.planes,
            stride=self.stride,
            dilation=self.dilation,
            conv_cfg=self.conv_cfg,
            norm_cfg=self.norm_cfg,
            **self.selective_kernel,
        )
        second = self.stage_dilation
        self.add_conv(2, self.planes, self.planes, 3, padding=second, dilation=second, deformable=True)


class SelectiveKernelBottleneck(SelectiveKernelBlock, Bottleneck):
    """A :class:`~resbackbone.blocks.Bottleneck` whose 3x3 is a selective-kernel convolution."""

    def add_spatial_conv(self, channels: int, stride: int, dilation: int) -> None:
        """Add ``conv2``, the selective-kernel convolution."""
        self.conv2 = SelectiveKernelConv2d(
            channels,
            channels,
            stride=stride,
            dilation=dilation,
            groups=self.groups,
            conv_cfg=self.spatial_conv_cfg(stride),
            norm_cfg=self.norm_cfg,
            **self.selective_kernel,
        )
