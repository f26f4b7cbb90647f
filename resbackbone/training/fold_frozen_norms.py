"""Fold frozen batch norms while training: less activation memory, the same gradients up to rounding."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from resbackbone.layers import Module
from resbackbone.layers.conv_norm import set_folding
from resbackbone.utils.validation import check_flag

Net = TypeVar("Net", bound=nn.Module)


def fold_frozen_norms(net: Net, enabled: bool = True) -> Net:
    """Compute each convolution and the frozen batch norm after it as one convolution, in training too.

    A batch norm in eval mode (``norm_eval=True``, frozen stages, ``net.eval()``) and :class:`FrozenBatchNorm2d
    <resbackbone.layers.FrozenBatchNorm2d>` are affine maps. Folded into the convolution they take no time, and no
    intermediate result is saved for the backward pass. The gradients of weight, gamma and beta are the same up to
    rounding. The mode of each norm is read in every forward pass: one in train mode uses the statistics of the batch.

    Modules, parameters and state dict keys do not change, so optimizers, checkpoints, ``with_cp``, autocast,
    ``torch.compile`` and distributed wrappers work as before. A layer with a hook or in a traced graph is called
    without folding. So are deformable and switchable atrous convolutions, and layers in third-party forward passes.

    Args:
        net: A backbone, or a model that contains one or several. Modified in place.
        enabled: False turns folding off again.

    Returns:
        The same net.

    Raises:
        TypeError: If ``enabled`` is not a bool.
        ValueError: If ``net`` contains no module of resbackbone.

    Source: You et al., Efficient ConvBN Blocks for Transfer Learning and Beyond, arXiv:2305.11624.

    >>> from resbackbone import build_backbone
    >>> net = fold_frozen_norms(build_backbone("resnet50", frozen_stages=1)).train()
    """
    check_flag("enabled", enabled)
    if not any(isinstance(layer, Module) for layer in net.modules()):
        raise ValueError(
            f"`net` must be or contain a backbone of resbackbone, got a {type(net).__name__} without; "
            "build one with resbackbone.build_backbone"
        )
    set_folding(net, enabled)
    return net
