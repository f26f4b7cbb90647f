"""Efficient channel attention: gates computed by a 1D convolution along the channels."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor, nn

from resbackbone.layers.arguments import MAX_CHANNELS
from resbackbone.registry import MODELS, register_kind
from resbackbone.utils.validation import check_count, check_int, check_number


@register_kind("plugin")
@MODELS.register_module()
class ECALayer(nn.Module):
    """Scale each channel by a gate from 0 to 1, computed by a 1D convolution of the channels' means.

    As a plugin: ``dict(cfg=dict(type="ECALayer"), position="after_conv3")``, after the last convolution as in the
    paper.

    Args:
        in_channels: Channels of the feature map.
        kernel_size: Channels per gate, an odd number; None for the odd number next to
            ``(log2(in_channels) + offset) / slope``, but at least 3.
        slope: The paper's gamma.
        offset: The paper's b.

    Shapes:
        ``(N, in_channels, H, W)`` to the same.

    Raises:
        TypeError, ValueError: If ``kernel_size`` is not odd or ``slope`` is not above 0.

    Source: Wang et al., ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks, arXiv:1910.03151,
    section 3.2, equation 12 for the size; its rounding, down and then up to odd, is that of BangguWu/ECANet.

    >>> [ECALayer(channels).kernel_size for channels in (16, 64, 256, 2048)]
    [3, 3, 5, 7]
    """

    _abbr_: ClassVar[str] = "eca_layer"

    def __init__(
        self, in_channels: int, *, kernel_size: int | None = None, slope: float = 2.0, offset: float = 1.0
    ) -> None:
        super().__init__()
        check_int("in_channels", in_channels, low=1)
        check_number("slope", slope, low=0, above=True)
        check_number("offset", offset)
        if kernel_size is None:
            nearest = int(min(abs(math.log2(in_channels) + offset) / slope, MAX_CHANNELS))
            kernel_size = max(nearest + 1 - nearest % 2, 3)
        check_count("kernel_size", kernel_size, most=MAX_CHANNELS + 1)
        if kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` must be odd, got {kernel_size}, since the padding is symmetric")
        self.kernel_size = kernel_size
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to the same shape."""
        means = x.mean((2, 3))
        gates = self.conv(means.unsqueeze(1)).sigmoid().transpose(1, 2).unsqueeze(-1)
        out: Tensor = x * gates
        return out
