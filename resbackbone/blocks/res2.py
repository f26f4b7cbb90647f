"""The block of Res2Net: a bottleneck whose 3x3 is split into several, each adding to what the next one sees."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from resbackbone.blocks.base import BlockOptions, grouped_width
from resbackbone.blocks.bottleneck import Bottleneck
from resbackbone.layers import build_conv_layer, build_norm_layer
from resbackbone.layers.arguments import MAX_CHANNELS, MAX_PARTS
from resbackbone.utils.validation import check_choice, check_count, check_flag


class Bottle2neck(Bottleneck):
    """A bottleneck whose middle is ``scales`` splits: a 3x3 for each but the last.

    Each 3x3 sees its split and the output of the one before. In the first block of a stage (``stage_type="stage"``) and
    wherever the block strides, each sees its split alone. Where it strides, the last split is average-pooled over 3x3
    pixels. The 3x3s are ``convs``, their norms ``bns``; there is no ``norm2``. ``dcn`` makes all 3x3s deformable.

    Args:
        inplanes: Input channels.
        planes: A quarter of the output channels.
        scales: Number of splits.
        base_width: Channels per split, and per group of it, in the first stage.
        base_channels: ``planes`` of the first stage.
        stage_type: "stage" for the first block of a stage, "normal" for the others.
        groups: Groups of each 3x3 (Res2NeXt).
        pool_at_stride_1: Pool the last split of a first block even if it does not stride; see
            :class:`~resbackbone.Res2Net`.
        options: As for :class:`~resbackbone.blocks.Bottleneck`; plugins ``after_conv2`` see all splits side by side.

    Raises:
        ValueError: If ``scales`` is below 2.

    Source: Gao et al., Res2Net: A New Multi-scale Backbone Architecture, arXiv:1904.01169, figure 2b.
    """

    unsupported: ClassVar[tuple[str, ...]] = ("anti_aliasing", "ibn")

    def __init__(
        self,
        inplanes: int,
        planes: int,
        scales: int = 4,
        base_width: int = 26,
        base_channels: int = 64,
        stage_type: Literal["normal", "stage"] = "normal",
        *,
        groups: int = 1,
        pool_at_stride_1: bool = False,
        **options: Unpack[BlockOptions],
    ) -> None:
        check_splits(scales, base_width, groups, pool_at_stride_1)
        check_choice("stage_type", stage_type, ("normal", "stage"))
        self.scales = scales
        self.stage_type = stage_type
        self.pool_at_stride_1 = pool_at_stride_1
        self.split_width = grouped_width(planes, base_width, base_channels) * groups
        super().__init__(inplanes, planes, width=self.split_width * scales, groups=groups, **options)
        for name in ("convs", "bns"):
            # At the end, as in mmdet: the state of an optimizer is in the order of the parameters.
            self._modules[name] = self._modules.pop(name)

    def add_spatial_conv(self, channels: int, stride: int, dilation: int) -> None:
        """Add the 3x3s and their norms."""
        first = self.stage_type == "stage" or stride > 1
        self.hierarchical = not first
        self.pool = None
        if first and (stride > 1 or self.pool_at_stride_1):
            self.pool = nn.AvgPool2d(3, stride, padding=1)
        self.convs = nn.ModuleList()
        self.bns = nn.ModuleList()
        for _ in range(self.scales - 1):
            conv = build_conv_layer(
                self.spatial_conv_cfg(stride),
                *(self.split_width, self.split_width, 3),
                stride=stride,
                padding=dilation,
                dilation=dilation,
                groups=self.groups,
                bias=False,
            )
            self.convs.append(conv)
            self.bns.append(build_norm_layer(self.norm_cfg, self.split_width)[1])

    def conv2(self, x: Tensor) -> Tensor:  # a method in place of the layer
        """Run each split through its 3x3 with norm and ReLU, and add its output to the next split.

        Args:
            x: All splits side by side, ``(N, width, H, W)``.

        Returns:
            ``(N, width, H/stride, W/stride)``.
        """
        splits = x.chunk(self.scales, 1)
        outs: list[Tensor] = []
        for index, (conv, norm) in enumerate(zip(self.convs, self.bns, strict=True)):
            split = outs[-1] + splits[index] if outs and self.hierarchical else splits[index]
            outs.append(self.relu(self.conv_norm(split, conv, norm)))
        last = splits[self.scales - 1]
        outs.append(last if self.pool is None else self.pool(last))
        return torch.cat(outs, 1)


def check_splits(scales: object, base_width: object, groups: object, pool_at_stride_1: object) -> None:
    """Raise unless the arguments that make a bottleneck a Bottle2neck are of their types and in range."""
    check_count("scales", scales, most=MAX_PARTS)
    if scales == 1:
        raise ValueError("`scales` must be at least 2, got 1; with one split there is nothing to add up: use a ResNet")
    check_count("base_width", base_width, most=MAX_CHANNELS)
    check_count("groups", groups, most=MAX_PARTS)
    check_flag("pool_at_stride_1", pool_at_stride_1)
