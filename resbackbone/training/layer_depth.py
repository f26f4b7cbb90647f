"""Depth of each parameter in a backbone, for layer-wise learning rate decay."""

from __future__ import annotations

import math
import re
from itertools import accumulate

from resbackbone.backbones import ResNet


def layer_depth(net: ResNet, name: str) -> tuple[int, int]:
    """Return the depth of a parameter, and that of the head.

    The stem has depth 0 and the first stage depth 1. In the second and third stage, two and three blocks (up to six in
    the deepest networks) share a depth. The fourth stage has a single depth; the head comes after the last stage.

    Args:
        net: The backbone.
        name: The parameter's name in it.

    Returns:
        The parameter's depth and the head's. A norm after the last stage has the head's depth.

    Source: mmpretrain 1.2.0 ``models/backbones/resnet.py``, which supports five depths only.

    >>> net = ResNet(50)
    >>> layer_depth(net, "conv1.weight"), layer_depth(net, "layer4.0.bn1.bias")
    ((0, 7), (6, 7))
    """
    first, second, third, last = (*net.stage_blocks, 1, 1, 1)[:4]
    blocks_per_depth = (first, {8: 4, 24: 4, 30: 5}.get(second, 2), {36: 4, 48: 6}.get(third, 3), last)
    depths = [math.ceil(blocks / share) for blocks, share in zip(net.stage_blocks, blocks_per_depth, strict=False)]
    *starts, head = accumulate((1, *depths))
    layer, _, rest = name.partition(".")
    if layer in net.res_layers:
        stage = net.res_layers.index(layer)
        block = re.match(r"\d+", rest)
        return starts[stage] + (int(block[0]) // blocks_per_depth[stage] if block else 0), head
    layers = [child for child, _ in net.named_children()]
    after_last_stage = layer in layers[layers.index(net.res_layers[-1]) :]
    return head if after_last_stage else 0, head
