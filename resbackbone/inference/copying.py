"""Copies of nets that are to compute, not to train."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

Net = TypeVar("Net", bound=nn.Module)


def copy_for_inference(net: Net) -> Net:
    """Return a copy of a net in eval mode and without gradients."""
    copied = copy.deepcopy(net)
    copied.eval()  # whose value is None in a subclass with mmdet's `train`
    return copied.requires_grad_(False)
