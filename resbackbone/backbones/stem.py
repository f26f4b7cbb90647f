"""The layers before the first stage: the 7x7 stem of the paper and the deep stem of ResNet-C."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from resbackbone.layers import Sequential, build_conv_layer, build_norm_layer
from resbackbone.layers.module import Config


def conv_norm_relu(
    in_channels: int, out_channels: int, conv_cfg: Config | None, norm_cfg: Config, *, stride: int = 1
) -> list[nn.Module]:
    """Make a 3x3 convolution, its norm and a ReLU."""
    return [
        build_conv_layer(conv_cfg, in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False),
        build_norm_layer(norm_cfg, out_channels)[1],
        nn.ReLU(inplace=True),
    ]


def make_deep_stem(
    in_channels: int, channels: Sequence[int], conv_cfg: Config | None, norm_cfg: Config
) -> nn.Sequential:
    """Make three 3x3 convolutions, with norms and ReLUs, in place of one 7x7.

    Args:
        in_channels: Channels of the images.
        channels: Output channels of each of the three.
        conv_cfg: Config of the convolutions.
        norm_cfg: Config of the norms.

    Returns:
        ``(N, in_channels, H, W)`` to ``(N, channels[2], ceil(H/2), ceil(W/2))``.

    Source: ResNet-C of He et al., Bag of Tricks, arXiv:1812.01187, figure 2b.
    """
    first, second, third = channels
    return Sequential(  # ours calls the `init_weights()` of its layers, torch's does not
        *conv_norm_relu(in_channels, first, conv_cfg, norm_cfg, stride=2),
        *conv_norm_relu(first, second, conv_cfg, norm_cfg),
        *conv_norm_relu(second, third, conv_cfg, norm_cfg),
    )
