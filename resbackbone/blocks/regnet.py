"""The block of RegNet: a grouped bottleneck that is as wide in the middle as at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from resbackbone.blocks.bottleneck import Bottleneck
from resbackbone.layers.module import Config
from resbackbone.layers.se import SELayer


class RegNetBottleneck(Bottleneck):
    """A bottleneck whose ``planes`` channels go out as they are, with a grouped 3x3 and optionally attention behind it.

    Args:
        inplanes: Channels that come in.
        planes: Channels that go out.
        group_width: Channels per group of the 3x3; the 3x3's channels are a multiple of it, or fewer.
        bot_mul: Channels of the 3x3 per channel that goes out.
        se_ratio: Channels that squeeze-and-excitation squeezes to, per channel that comes in; 0 for no such layer. It
            stands behind the 3x3, before the plugins ``after_conv2``.
        plugins: As for :class:`~resbackbone.blocks.ResidualBlock`.
        kwargs: As for :class:`~resbackbone.blocks.Bottleneck`.

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
        plugins: Sequence[Config] | None = None,
        **kwargs: Any,
    ) -> None:
        width = round(planes * bot_mul)
        if se_ratio:
            squeeze: Config = {"type": SELayer, "squeeze_channels": max(1, round(inplanes * se_ratio))}
            plugins = [{"cfg": squeeze, "position": "after_conv2"}, *(plugins or ())]
        groups = width // min(group_width, width)
        super().__init__(inplanes, planes, width=width, groups=groups, plugins=plugins, **kwargs)
