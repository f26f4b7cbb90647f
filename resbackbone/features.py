"""What a backbone promises to whatever stands behind it: name, channels and stride of each feature map."""

from __future__ import annotations

from typing import NamedTuple


class FeatureInfo(NamedTuple):
    """One feature map that a backbone hands out.

    Attributes:
        name: The module that makes it, such as ``"layer1"``.
        stage: Its stage, counted from 0.
        channels: Its number of channels.
        stride: Input pixels per feature pixel, in both directions: an input of ``H`` rows gives ``ceil(H / stride)``
            rows, up to the rounding of each strided layer.
    """

    name: str
    stage: int
    channels: int
    stride: int
