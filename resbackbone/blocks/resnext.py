"""The block of ResNeXt: a bottleneck whose 3x3 is grouped."""

from __future__ import annotations

import math
from typing import Any

from resbackbone.blocks.bottleneck import Bottleneck


class ResNeXtBottleneck(Bottleneck):
    """A bottleneck with ``groups`` groups of ``base_width`` channels each, growing with ``planes``.

    Args:
        inplanes: Channels that come in.
        planes: A quarter of the channels that go out.
        groups: Groups of the 3x3, the paper's cardinality.
        base_width: Channels per group in the first stage.
        base_channels: ``planes`` of the first stage.
        kwargs: As for :class:`~resbackbone.blocks.Bottleneck`.

    Source: Xie et al., Aggregated Residual Transformations for Deep Neural Networks, arXiv:1611.05431, figure 3c.
    """

    def __init__(
        self, inplanes: int, planes: int, groups: int = 1, base_width: int = 4, base_channels: int = 64, **kwargs: Any
    ) -> None:
        # With one group this is a plain bottleneck, as upstream, whatever `base_width` says.
        width = planes if groups == 1 else grouped_width(planes, base_width, base_channels) * groups
        super().__init__(inplanes, planes, width=width, groups=groups, **kwargs)


def grouped_width(planes: int, base_width: int, base_channels: int) -> int:
    """Return the channels of one group (or split) of a block's 3x3.

    Args:
        planes: The block's width before expansion.
        base_width: Channels per group in the first stage.
        base_channels: ``planes`` of the first stage.

    Raises:
        ValueError: If there would be none.
    """
    width = math.floor(planes * (base_width / base_channels))  # as upstream, whose rounding may lose a channel
    width = width or planes * base_width // base_channels  # but never the only one
    if width < 1:
        raise ValueError(
            f"`base_width` (={base_width}) leaves no channels per group where `planes` is {planes}: it is for "
            f"{base_channels} `base_channels`; give more of either"
        )
    return width
