"""Squeeze-and-excitation: channel attention computed from the means of all channels."""

from __future__ import annotations

from torch import Tensor, nn

from resbackbone.layers.arguments import MAX_CHANNELS
from resbackbone.layers.conv import ConvNormAct
from resbackbone.registry import MODELS, register_kind
from resbackbone.utils.validation import check_count, check_int


@register_kind("plugin")
@MODELS.register_module()
class SELayer(nn.Module):
    """Scale each channel by a gate from 0 to 1, computed by two 1x1 convolutions from the means of all channels.

    As a plugin: ``dict(cfg=dict(type="SELayer", ratio=8), position="after_conv2")``.

    Args:
        in_channels: Channels of the feature map.
        ratio: Reduction ratio: input channels per channel between the two convolutions.
        squeeze_channels: Channels between the two convolutions, which replaces ``ratio`` and ``divisor``; None for
            ``in_channels // ratio`` rounded to a multiple of ``divisor``.
        divisor: See ``squeeze_channels``.

    Shapes:
        ``(N, in_channels, H, W)`` to the same.

    Raises:
        TypeError, ValueError: If an argument is not an integer of at least 1.

    Source: Hu et al., Squeeze-and-Excitation Networks, arXiv:1709.01507, figure 2; the rounding is that of mmpretrain
    1.2.0 ``models/utils/make_divisible.py``.

    >>> SELayer(256).conv1.conv.out_channels, SELayer(64).conv1.conv.out_channels
    (16, 8)
    """

    _abbr_ = "se_layer"

    def __init__(
        self, in_channels: int, *, ratio: int = 16, squeeze_channels: int | None = None, divisor: int = 8
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("ratio", ratio)):
            check_int(name, value, low=1)
        check_count("divisor", divisor, most=MAX_CHANNELS)
        if squeeze_channels is None:
            squeeze_channels = _round_to_multiple(in_channels // ratio, divisor)
        else:
            check_count("squeeze_channels", squeeze_channels, most=MAX_CHANNELS)
        self.global_avgpool = nn.AdaptiveAvgPool2d(1)
        self.conv1 = ConvNormAct(in_channels, squeeze_channels, 1, act_cfg={"type": nn.ReLU, "inplace": True})
        self.conv2 = ConvNormAct(squeeze_channels, in_channels, 1, act_cfg={"type": nn.Sigmoid})

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to the same shape."""
        gates: Tensor = self.conv2(self.conv1(self.global_avgpool(x)))
        return x * gates


def _round_to_multiple(channels: int, divisor: int) -> int:
    """Round to the nearest multiple of ``divisor``, half up, but to at least 90% of ``channels`` and one ``divisor``.

    >>> [_round_to_multiple(channels, 8) for channels in (4, 11, 12, 20, 32)]
    [8, 16, 16, 24, 32]
    """
    nearest = max(divisor, (channels + divisor // 2) // divisor * divisor)
    return nearest if nearest >= 0.9 * channels else nearest + divisor
