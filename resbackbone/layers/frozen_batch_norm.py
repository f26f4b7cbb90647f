"""The batch norm with fixed statistics and a fixed affine map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resbackbone.layers.arguments import check_eps
from resbackbone.registry import MODELS, register_kind


@register_kind("norm")
@MODELS.register_module("FrozenBN")
class FrozenBatchNorm2d(nn.Module):
    """Batch norm with fixed statistics and a fixed affine map: four buffers, nothing to train.

    In eval mode a :class:`torch.nn.BatchNorm2d` with the same values gives the same bits. Its state dict loads here
    (``num_batches_tracked`` is passed over).

    Args:
        num_features: Channels.
        eps: Added to the variance before the root.

    Source: Detectron2's ``FrozenBatchNorm2d``; He et al., Mask R-CNN, arXiv:1703.06870, section 3.1.
    """

    _abbr_ = "bn"
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = check_eps("eps", eps, in_eval=True)
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, num_features, H, W)`` to the same shape."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Show the channels and eps in ``repr``."""
        return f"{self.num_features}, eps={self.eps}"
