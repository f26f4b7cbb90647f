"""Weight standardization as in BiT and timm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resbackbone.layers.weight_standardization import ConvWS2d
from resbackbone.registry import MODELS


@MODELS.register_module()
class StdConv2d(ConvWS2d):
    """A convolution with filters of mean 0 and variance 1, as in BiT and timm.

    It divides by the square root of the biased variance plus ``eps``; :class:`~resbackbone.layers.ConvWS2d`, as in
    mmcv, by the unbiased standard deviation plus ``eps``. The results differ by a factor of ``sqrt(n / (n - 1))`` for
    filters of ``n`` numbers, so the checkpoints of one do not fit the other.

    Args:
        args: As for ``nn.Conv2d``.
        eps: Added to the variance before the square root; 1e-8 in BiT.
        kwargs: As for ``nn.Conv2d``.

    Raises:
        ValueError: If a filter is a single number.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``, as in ``nn.Conv2d``.

    Source: Qiao et al., arXiv:1903.10520; Kolesnikov et al., Big Transfer, arXiv:1912.11370, section 3.1.

    >>> weight = StdConv2d(8, 4, 3).standardized_weight()
    >>> bool((weight.square().mean((1, 2, 3)) - 1).abs().max() < 1e-3)
    True
    """

    def __init__(self, *args: Any, eps: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(*args, eps=eps, **kwargs)

    def standardized_weight(self) -> Tensor:
        """Return the standardized weight, of the weight's shape, which the input is convolved with."""
        # Batch norm with one channel per filter, as in timm: the most exact way. Deep nets amplify the error of the
        # last bit by a factor of 1000.
        filters = self.weight.flatten(1).unsqueeze(0)
        return torch.batch_norm(filters, None, None, None, None, True, 0.0, self.eps, False).view_as(self.weight)
