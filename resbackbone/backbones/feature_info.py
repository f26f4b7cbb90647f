"""The description of a backbone's outputs: name, channels and stride of each feature map."""

from __future__ import annotations

from typing import Literal, NamedTuple

OutIndex = int | Literal["stem"]  # an entry of `out_indices`


class FeatureInfo(NamedTuple):
    """One feature map that a backbone returns.

    Attributes:
        name: The module that computes it, such as ``"layer1"``; ``"stem"`` for the map before the stem's pooling.
        stage: Its stage, counted from 0; -1 for what comes before the first stage.
        channels: Its number of channels.
        stride: Input pixels per feature pixel, in both directions: an input of ``H`` rows gives ``ceil(H / stride)``
            rows, up to the rounding of each strided layer.
    """

    name: str
    stage: int
    channels: int
    stride: int
