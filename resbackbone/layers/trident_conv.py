"""The convolution of TridentNet, which runs at several dilations with shared weights."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class TridentConv2d(nn.Conv2d):
    """A 3x3 convolution whose dilation is an optional argument of ``forward``; the padding is equal to it."""

    def forward(self, input: Tensor, dilation: int | None = None) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, ceil(H/stride), ceil(W/stride))``."""
        if dilation is None:
            return super().forward(input)
        return F.conv2d(input, self.weight, self.bias, self.stride, padding=dilation, dilation=dilation)
