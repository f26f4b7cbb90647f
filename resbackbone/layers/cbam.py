"""CBAM: channel attention followed by spatial attention."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resbackbone.layers.arguments import MAX_PIXELS
from resbackbone.layers.conv import build_conv_layer
from resbackbone.layers.conv_norm import ConvNormModule
from resbackbone.layers.module import Config
from resbackbone.layers.norm import build_norm_layer
from resbackbone.registry import MODELS, register_kind
from resbackbone.utils.validation import check_count, check_int

BATCH_NORM: Config = {"type": "BN"}  # read, never written to


class ChannelAttention(nn.Module):
    """Scale each channel by a gate computed from its mean and maximum by a shared multilayer perceptron.

    Args:
        in_channels: Channels of the feature map.
        squeeze_channels: Channels of the perceptron's hidden layer.

    Source: arXiv:1807.06521, equation 2.
    """

    def __init__(self, in_channels: int, squeeze_channels: int) -> None:
        super().__init__()
        self.fc1 = build_conv_layer(None, in_channels, squeeze_channels, 1, bias=False)
        self.fc2 = build_conv_layer(None, squeeze_channels, in_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to the same shape."""
        pooled = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        mean, peak = (self.fc2(F.relu(self.fc1(values))) for values in pooled)
        out: Tensor = x * (mean + peak).sigmoid()
        return out


class SpatialAttention(ConvNormModule):
    """Scale each pixel by a gate computed by a convolution of the mean and the maximum over channels.

    Args:
        kernel_size: Side of the convolution's kernel in pixels, an odd number.
        norm_cfg: Config of the norm after it.

    Source: arXiv:1807.06521, equation 3; the norm is only in the authors' code (Jongchan/attention-module).
    """

    def __init__(self, kernel_size: int, norm_cfg: Config) -> None:
        super().__init__()
        self.conv = build_conv_layer(None, 2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm_name, norm = build_norm_layer(norm_cfg, 1)
        self.add_module(self.norm_name, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to the same shape."""
        maps = torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), dim=1)
        out: Tensor = x * self.conv_norm(maps, self.conv, self.norm_name).sigmoid()
        return out


@register_kind("plugin")
@MODELS.register_module()
class CBAM(nn.Module):
    """Convolutional block attention module: :class:`ChannelAttention`, then :class:`SpatialAttention`.

    As a plugin: ``dict(cfg=dict(type="CBAM"), position="after_conv3")``, after the last convolution as in the paper.

    Args:
        in_channels: Channels of the feature map.
        ratio: Input channels per channel of the perceptron's hidden layer.
        kernel_size: Side of the spatial convolution's kernel in pixels, an odd number.
        norm_cfg: Config of the norm after the spatial convolution; it has one channel.

    Shapes:
        ``(N, in_channels, H, W)`` to the same.

    Raises:
        TypeError, ValueError: If an argument is invalid.

    Source: Woo et al., CBAM: Convolutional Block Attention Module, arXiv:1807.06521, figures 2 and 3; the order of the
    two modules is that of its table 3.
    """

    _abbr_: ClassVar[str] = "cbam"

    def __init__(
        self, in_channels: int, *, ratio: int = 16, kernel_size: int = 7, norm_cfg: Config = BATCH_NORM
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("ratio", ratio)):
            check_int(name, value, low=1)
        check_count("kernel_size", kernel_size, most=MAX_PIXELS)
        if kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` must be odd, got {kernel_size}, since the padding is symmetric")
        self.channel = ChannelAttention(in_channels, max(in_channels // ratio, 1))
        self.spatial = SpatialAttention(kernel_size, norm_cfg)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to the same shape."""
        out: Tensor = self.spatial(self.channel(x))
        return out
