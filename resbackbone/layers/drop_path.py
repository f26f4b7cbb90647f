"""Drop path (stochastic depth): drop residual branches at random during training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resbackbone.utils.validation import check_number


class DropPath(nn.Module):
    """Zero the branch of a sample with probability ``drop_prob`` during training; scale the others to keep the mean.

    Args:
        drop_prob: Probability, at least 0 and below 1.

    Source: Huang et al., Deep Networks with Stochastic Depth, arXiv:1603.09382, equations 2 and 5; random numbers
    as in mmcv 2.1.0 ``cnn/bricks/drop.py``.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = check_number("drop_prob", drop_prob, low=0, high=1, below=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, ...)`` to the same shape; the identity in eval mode."""
        if not self.training or self.drop_prob == 0.0:
            return x
        keep = 1.0 - self.drop_prob
        # The random numbers and the rounding of mmcv's DropPath, so that a seed gives the same result.
        draws = torch.rand((x.shape[0],) + (1,) * (x.dim() - 1), dtype=x.dtype, device=x.device)
        return x.div(keep) * (draws + keep).floor()

    def extra_repr(self) -> str:
        """Show the probability in ``repr``."""
        return f"drop_prob={self.drop_prob:g}"
