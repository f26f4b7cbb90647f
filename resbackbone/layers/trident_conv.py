"""The convolution of TridentNet, which is run at several dilations."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class TridentConv2d(nn.Conv2d):
    """A convolution that can be run at another dilation than its own; its padding follows, so that the size stays."""

    def forward(self, input: Tensor, dilation: int | None = None) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, ceil(H/stride), ceil(W/stride))`` with a 3x3 kernel."""
        if dilation is None:
            return super().forward(input)
        return F.conv2d(input, self.weight, self.bias, self.stride, padding=dilation, dilation=dilation)
