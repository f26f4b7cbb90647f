"""Weight standardization as BiT has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resbackbone.layers.weight_standardization import ConvWS2d
from resbackbone.registry import MODELS


@MODELS.register_module()
class StdConv2d(ConvWS2d):
    """A convolution whose filters have mean 0 and variance 1, as in BiT and timm.

    :class:`~resbackbone.layers.ConvWS2d` is as in mmcv: it divides by the unbiased standard deviation plus ``eps``,
    this by the root of the biased variance plus ``eps``. The results are ``sqrt(n / (n - 1))`` apart for filters of
    ``n`` numbers, so that the weights of one do not fit the other.

    Args:
        args: As for ``nn.Conv2d``.
        eps: Added to the variance before the root. BiT has 1e-8.
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
        """Return the filters that are convolved with, of the weight's shape."""
        # Batch norm with a filter for a channel, timm's way and the most exact: deep nets multiply a last bit by 1000.
        filters = self.weight.flatten(1).unsqueeze(0)
        return torch.batch_norm(filters, None, None, None, None, True, 0.0, self.eps, False).view_as(self.weight)
