"""Frozen batch norms folded into convolutions while training: half the memory, faster steps, the same gradients."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from resbackbone.layers import Module
from resbackbone.layers.conv_norm import set_folding
from resbackbone.utils.validation import check_flag

Net = TypeVar("Net", bound=nn.Module)


def fold_frozen_norms(net: Net, enabled: bool = True) -> Net:
    """Run every convolution that a frozen norm follows as one convolution, also while training.

    A batch norm in eval mode (``norm_eval=True``, frozen stages, ``net.eval()``) and :class:`FrozenBatchNorm2d
    <resbackbone.layers.FrozenBatchNorm2d>` are affine maps. Folded into the convolution they cost nothing, and what
    goes in between is not kept for the backward pass. Gradients of weight, gamma and beta are the same up to rounding.
    Each norm is asked in each pass: one in train mode normalizes by the batch, as ever.

    Modules, parameters and keys stay what they are, so that optimizers, checkpoints, ``with_cp``, autocast,
    ``torch.compile`` and wrappers for several processes see the same net. What relies on a layer being called, such as
    a forward hook or a traced graph, gets plain calls of that layer. So do deformable and switchable atrous
    convolutions, and forward passes that are not from here.

    Args:
        net: A backbone, or a model with one or several in it. It is changed.
        enabled: False for plain calls everywhere again.

    Returns:
        The net itself.

    Raises:
        TypeError: If ``enabled`` is no bool.
        ValueError: If nothing in ``net`` is from here.

    Source: You et al., Efficient ConvBN Blocks for Transfer Learning and Beyond, arXiv:2305.11624.

    >>> from resbackbone import build_backbone
    >>> net = fold_frozen_norms(build_backbone("resnet50", frozen_stages=1)).train()
    """
    check_flag("enabled", enabled)
    if not any(isinstance(layer, Module) for layer in net.modules()):
        raise ValueError(
            f"`net` must be one of resbackbone's backbones or have one in it, got a {type(net).__name__} without; "
            "build it with resbackbone.build_backbone"
        )
    set_folding(net, enabled)
    return net
