"""The block of RegNet: a grouped bottleneck that is as wide in the middle as at its end."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import Unpack

from resbackbone.blocks.base import BlockOptions
from resbackbone.blocks.bottleneck import Bottleneck
from resbackbone.layers.module import Config
from resbackbone.layers.se import SELayer


class RegNetBottleneck(Bottleneck):
    """A bottleneck of expansion 1, with a grouped 3x3 and optionally squeeze-and-excitation behind it.

    Args:
        inplanes: Input channels.
        planes: Output channels.
        group_width: Channels per group of the 3x3; the 3x3's channels are a multiple of it, or fewer.
        bot_mul: Channels of the 3x3 per output channel.
        se_ratio: Squeezed channels of squeeze-and-excitation per input channel of the block; 0 for no such layer. It
            is the first of the plugins ``after_conv2``.
        options: As for :class:`~resbackbone.blocks.ResidualBlock`.

    Source: Radosavovic et al., Designing Network Design Spaces, arXiv:2003.13678, figure 4, and section 4 on SE.
    """

    expansion: ClassVar[int] = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        *,
        group_width: int,
        bot_mul: float = 1.0,
        se_ratio: float = 0.0,
        **options: Unpack[BlockOptions],
    ) -> None:
        width = round(planes * bot_mul)
        if se_ratio:
            squeeze: Config = {"type": SELayer, "squeeze_channels": max(1, round(inplanes * se_ratio))}
            options["plugins"] = [{"cfg": squeeze, "position": "after_conv2"}, *(options.get("plugins") or ())]
        super().__init__(inplanes, planes, width=width, groups=width // min(group_width, width), **options)
