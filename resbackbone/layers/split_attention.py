"""Split attention: several convolutions of one feature map, weighed against each other channel by channel."""

from __future__ import annotations

import operator
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.instancenorm import _InstanceNorm

from resbackbone.layers.conv import build_conv_layer
from resbackbone.layers.module import Config, Module
from resbackbone.layers.norm import build_norm_layer


class SplitAttentionConv2d(Module):
    """Attention-weighted sum of ``radix`` parallel convolutions, with one weight per convolution and channel.

    The keys are those of OpenMMLab and of the paper's code: ``conv``, ``bn0``, ``fc1``, ``bn1``, ``fc2``.

    Args:
        in_channels: Number of input channels.
        out_channels: Number of output channels, also of each convolution.
        kernel_size: Side of the kernels in pixels.
        stride: Stride in pixels.
        padding: Zeros added on each side, in pixels.
        dilation: Dilation in pixels.
        groups: Groups of each convolution and of the attention, the paper's cardinality.
        radix: Number of convolutions; with 1 the weights are gates from 0 to 1, otherwise they sum to 1 over the radix.
        reduction_factor: The attention has ``in_channels * radix // reduction_factor`` channels, but at least 32.
        conv_cfg: Config of ``conv``, which may be deformable; the attention's convolutions are ``nn.Conv2d``.
        norm_cfg: Config of both norms. The second normalizes maps of one pixel.

    Shapes:
        ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``, as a convolution with these arguments.

    Raises:
        ValueError: If ``groups`` does not divide the attention's channels, or its norm would normalize single values,
            as instance norm does on one pixel.

    Source: Zhang et al., ResNeSt: Split-Attention Networks, arXiv:2004.08955, figure 2 and section 3.1.

    >>> import torch
    >>> layer = SplitAttentionConv2d(16, 24, 3, padding=1, groups=2, norm_cfg={"type": "BN"}).eval()
    >>> layer(torch.zeros(1, 16, 5, 7)).shape
    torch.Size([1, 24, 5, 7])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        radix: int = 2,
        reduction_factor: int = 4,
        conv_cfg: Config | None = None,
        norm_cfg: Config,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.groups = groups
        self.radix = radix
        channels = max(in_channels * radix // reduction_factor, 32)
        if channels % groups:
            raise ValueError(
                f"the {channels} channels of the split attention must be divisible by `groups`, got {groups}; "
                "`reduction_factor` and the width change them"
            )
        self.norm0_name, norm0 = build_norm_layer(norm_cfg, out_channels * radix, postfix=0)
        self.norm1_name, norm1 = build_norm_layer(norm_cfg, channels, postfix=1)
        check_norm_of_one_pixel(norm1, norm_cfg, "split attention")
        self.conv = build_conv_layer(
            conv_cfg,
            in_channels,
            out_channels * radix,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups * radix,
            bias=False,
        )
        self.add_module(self.norm0_name, norm0)
        self.relu = nn.ReLU(inplace=True)
        self.fc1 = build_conv_layer(None, out_channels, channels, 1, groups=groups)
        self.add_module(self.norm1_name, norm1)
        self.fc2 = build_conv_layer(None, channels, out_channels * radix, 1, groups=groups)

    def attention(self, pooled: Tensor) -> Tensor:
        """Map the means ``(N, out_channels, 1, 1)`` to weights ``(N, radix, out_channels, 1, 1)``."""
        hidden = self.relu(self.conv_norm(pooled, self.fc1, self.norm1_name))
        logits: Tensor = self.fc2(hidden)
        if self.radix == 1:
            return logits.sigmoid().unsqueeze(1)
        # The channels of fc2 are ordered by group first, those of the convolutions by radix first.
        by_group = torch.unflatten(logits, 1, (self.groups, self.radix, -1))
        return by_group.transpose(1, 2).softmax(1).flatten(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""
        x = self.relu(self.conv_norm(x, self.conv, self.norm0_name))
        splits = torch.unflatten(x, 1, (self.radix, -1))
        weights = self.attention(F.adaptive_avg_pool2d(add_up(splits, self.radix), 1))
        return add_up(weights * splits, self.radix)


def add_up(splits: Tensor, count: int) -> Tensor:
    """Compute ``splits.sum(1)`` of ``(N, count, C, H, W)`` bit-identically, but faster in channels_last."""
    if count > 4:  # sum() adds more in another order
        return splits.sum(1)
    parts = splits.unbind(1)
    # By index, since torch.fx cannot iterate over them.
    return reduce(operator.add, [parts[index] for index in range(count)])


def check_norm_of_one_pixel(norm: nn.Module, norm_cfg: Config, layer: str) -> None:
    """Raise if ``norm``, on maps of one pixel, would normalize single values, which gives zeros."""
    grouped = isinstance(norm, nn.GroupNorm) and norm.num_groups == norm.num_channels
    if grouped or isinstance(norm, _InstanceNorm):  # in training even with running statistics
        raise ValueError(
            f"{layer} normalizes maps of one pixel, so `norm_cfg` must normalize at least two channels together, "
            f"got {dict(norm_cfg)!r}; use batch norm, or group norm with fewer groups"
        )
