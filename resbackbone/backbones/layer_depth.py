"""How deep each parameter of a backbone lies, for learning rates that fall from the head to the images."""

from __future__ import annotations

import math
import re
from itertools import accumulate

from resbackbone.backbones.resnet import ResNet


def layer_depth(net: ResNet, name: str) -> tuple[int, int]:
    """Say how deep a parameter lies.

    The stem has depth 0, the first stage 1; in the second and third stage two and three blocks (in the longest nets up
    to six) share a depth; the last stage has one, and behind it comes the head.

    Args:
        net: The backbone.
        name: The parameter's name in it.

    Returns:
        The parameter's depth, and the head's. A norm that the backbone has behind its last stage lies as deep as it.

    Source: mmpretrain 1.2.0 ``models/backbones/resnet.py``, which knows five of the nets.

    >>> net = ResNet(50)
    >>> layer_depth(net, "conv1.weight"), layer_depth(net, "layer4.0.bn1.bias")
    ((0, 7), (6, 7))
    """
    first, second, third, last = (*net.stage_blocks, 1, 1, 1)[:4]
    sharing = (first, {8: 4, 24: 4, 30: 5}.get(second, 2), {36: 4, 48: 6}.get(third, 3), last)
    depths = [math.ceil(blocks / share) for blocks, share in zip(net.stage_blocks, sharing, strict=False)]
    *begins, head = accumulate((1, *depths))
    layer, _, rest = name.partition(".")
    if layer in net.res_layers:
        stage = net.res_layers.index(layer)
        block = re.match(r"\d+", rest)
        return begins[stage] + (int(block[0]) // sharing[stage] if block else 0), head
    layers = [child for child, _ in net.named_children()]
    is_behind = layer in layers[layers.index(net.res_layers[-1]) :]
    return head if is_behind else 0, head
