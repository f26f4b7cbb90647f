"""Drop path: whole residual branches left out at random while training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resbackbone.utils.validation import check_number


class DropPath(nn.Module):
    """Zero a sample's branch with probability ``drop_prob`` while training, and scale the others to keep the mean.

    Args:
        drop_prob: Probability, 0 to 1 (1 excluded).

    Source: Huang et al., Deep Networks with Stochastic Depth, arXiv:1603.09382, equations 2 and 5; draws as in
    mmcv 2.1.0 ``cnn/bricks/drop.py``.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = check_number("drop_prob", drop_prob, low=0, high=1, below=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, ...)`` to the same shape; the identity in eval mode."""
        if not self.training or self.drop_prob == 0.0:
            return x
        keep = 1.0 - self.drop_prob
        # The draws and the roundings of mmcv's DropPath, so that a seed gives what it gives there.
        draws = torch.rand((x.shape[0],) + (1,) * (x.dim() - 1), dtype=x.dtype, device=x.device)
        return x.div(keep) * (draws + keep).floor()

    def extra_repr(self) -> str:
        """Show the probability in ``repr``."""
        return f"drop_prob={self.drop_prob:g}"
