"""The layers before the first stage: the 7x7 stem of the paper and the deep stem of ResNet-C."""

from __future__ import annotations

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
    in_channels: int,
    channels: int,
    conv_cfg: Config | None,
    norm_cfg: Config,
    *,
    first_channels: int | None = None,
) -> nn.Sequential:
    """Make three 3x3 convolutions at half, half and full width in place of one 7x7.

    Args:
        in_channels: Channels of the images.
        channels: Channels that go out.
        conv_cfg: Config of the convolutions.
        norm_cfg: Config of the norms.
        first_channels: Channels behind the first convolution, where they are not the half.

    Returns:
        ``(N, in_channels, H, W)`` to ``(N, channels, ceil(H/2), ceil(W/2))``.

    Source: ResNet-C of He et al., Bag of Tricks, arXiv:1812.01187, figure 2b.
    """
    half = channels // 2
    first = half if first_channels is None else first_channels
    return Sequential(  # ours hands `init_weights()` on to its layers, torch's does not
        *conv_norm_relu(in_channels, first, conv_cfg, norm_cfg, stride=2),
        *conv_norm_relu(first, half, conv_cfg, norm_cfg),
        *conv_norm_relu(half, channels, conv_cfg, norm_cfg),
    )
