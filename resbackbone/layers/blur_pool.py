"""Anti-aliased downsampling: a low-pass filter before the stride, which makes features less sensitive to shifts."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resbackbone.layers.tracing import is_recording
from resbackbone.utils.validation import check_choice, check_int

AntiAliasing = Literal["blur", "average"]
PaddingMode = Literal["reflect", "replicate", "constant"]

torch.fx.wrap("_pad")  # a leaf, since it depends on sizes, which torch.fx cannot trace


class BlurPool2d(nn.Module):
    """Binomial blur followed by subsampling. It has no parameters, and no keys in the state dict.

    Args:
        channels: Channels of the feature map.
        kernel_size: Side of the filter in pixels, at least 2: the outer product of a row of Pascal's triangle, such as
            1-2-1, with itself.
        stride: Stride in pixels.
        padding_mode: "reflect" (maps must be larger than half the filter; the default filter accepts any map),
            "replicate" or, for zeros, "constant".

    Shapes:
        ``(N, channels, H, W)`` to ``(N, channels, ceil(H/stride), ceil(W/stride))``.

    Raises:
        TypeError, ValueError: If an argument does not fit.

    Source: Zhang, Making Convolutional Networks Shift-Invariant Again, arXiv:1904.11486, section 3.2.

    >>> BlurPool2d(1, kernel_size=3).filter[0, 0] * 16
    tensor([[1., 2., 1.],
            [2., 4., 2.],
            [1., 2., 1.]])
    """

    filter: Tensor

    def __init__(
        self, channels: int, *, kernel_size: int = 3, stride: int = 2, padding_mode: PaddingMode = "reflect"
    ) -> None:
        super().__init__()
        check_int("channels", channels, low=1)
        check_int("kernel_size", kernel_size, low=2)
        check_int("stride", stride, low=1)
        check_choice("padding_mode", padding_mode, get_args(PaddingMode))
        self.channels = channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding_mode = padding_mode
        self.register_buffer("filter", self._make_filter(), persistent=False)

    def _make_filter(self, **options: Any) -> Tensor:
        row = [math.comb(self.kernel_size - 1, k) / 2 ** (self.kernel_size - 1) for k in range(self.kernel_size)]
        weights = torch.tensor(row, **options)
        return torch.outer(weights, weights).repeat(self.channels, 1, 1, 1)

    def _load_from_state_dict(self, *args: Any) -> None:
        # A net built on the meta device gets the values of its filter here: the checkpoint does not have them.
        device = "cpu" if self.filter.is_meta else self.filter.device
        self.filter = self._make_filter(device=device, dtype=self.filter.dtype)
        super()._load_from_state_dict(*args)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, channels, H, W)`` to ``(N, channels, ceil(H/stride), ceil(W/stride))``."""
        before, after = (self.kernel_size - 1) // 2, self.kernel_size // 2
        x = _pad(x, (before, after), self.padding_mode)
        return F.conv2d(x, self.filter, stride=self.stride, groups=self.channels)

    def extra_repr(self) -> str:
        """Show the arguments in ``repr``."""
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, padding_mode={self.padding_mode!r}"
        )


def _pad(x: Tensor, border: tuple[int, int], mode: PaddingMode) -> Tensor:
    """Pad a map; "reflect" replicates a side of one pixel, for which torch raises."""
    # Not in a traced graph, where the comparison would hold for the example's size only.
    if mode == "reflect" and border[1] == 1 and not is_recording() and min(x.shape[2:]) == 1:
        x = F.pad(x, (0, 0, *border), mode="replicate" if x.shape[2] == 1 else mode)
        return F.pad(x, (*border, 0, 0), mode="replicate" if x.shape[3] == 1 else mode)
    return F.pad(x, border * 2, mode=mode)


def make_downsampling(anti_aliasing: AntiAliasing, channels: int, stride: int) -> nn.Module:
    """Return an anti-aliased downsampling layer, which replaces the stride of another layer.

    Args:
        anti_aliasing: "blur" for :class:`BlurPool2d`, "average" for average pooling.
        channels: Channels of the feature map.
        stride: Stride in pixels.

    Returns:
        A layer from ``(N, channels, H, W)`` to ``(N, channels, ceil(H/stride), ceil(W/stride))``.
    """
    if anti_aliasing == "blur":
        return BlurPool2d(channels, stride=stride)
    return nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
