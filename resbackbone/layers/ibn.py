"""IBN: instance norm for one half of the channels, batch norm for the other."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from resbackbone.layers.arguments import check_eps
from resbackbone.layers.module import Config
from resbackbone.layers.norm import build_norm_layer
from resbackbone.registry import MODELS
from resbackbone.utils.validation import check_int

BATCH_NORM: Config = {"type": "BN"}  # read, never written to


@MODELS.register_module()
class IBN(nn.Module):
    """Instance norm for the first half of the channels, another norm for the rest.

    The keys are those of XingangPan/IBN-Net: ``IN`` and ``BN``, for any other norm.

    Args:
        num_features: Number of channels.
        eps: Added to the variance of the instance norm.
        norm_cfg: Config of the other norm.

    Shapes:
        ``(N, num_features, H, W)`` to the same. On a map of one pixel instance norm returns its bias.

    Raises:
        TypeError, ValueError: If there are fewer than two channels.

    Source: Pan et al., Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net, arXiv:1807.09441,
    section 3.2 and figure 3 (a).

    >>> layer = IBN(7)
    >>> layer.IN.num_features, layer.BN.num_features
    (3, 4)
    """

    _abbr_: ClassVar[str] = "bn"

    def __init__(self, num_features: int, *, eps: float = 1e-5, norm_cfg: Config = BATCH_NORM) -> None:
        super().__init__()
        check_int("num_features", num_features, low=1)
        if num_features < 2:
            raise ValueError(
                "`num_features` must be at least 2, got 1: one half of the channels has instance norm; "
                "a larger `base_channels` makes layers wider"
            )
        check_eps("eps", eps)
        self.num_instance = num_features // 2
        self.IN = make_instance_norm(self.num_instance, norm_cfg, eps=eps)
        self.BN = build_norm_layer(norm_cfg, num_features - self.num_instance)[1]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, num_features, H, W)`` to the same shape."""
        return torch.cat((self.IN(x[:, : self.num_instance]), self.BN(x[:, self.num_instance :])), dim=1)


class InstanceNorm2d(nn.InstanceNorm2d):
    """torch's instance norm without running statistics, and without size checks, which cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, num_features, H, W)`` to the same shape."""
        cudnn = torch.backends.cudnn.enabled
        return torch.instance_norm(x, self.weight, self.bias, None, None, True, 0.0, self.eps, cudnn)


def make_instance_norm(num_features: int, norm_cfg: Config, eps: float = 1e-5) -> nn.Module:
    """Build an instance norm with affine parameters, which train unless ``norm_cfg`` has ``requires_grad=False``."""
    cfg = {"type": InstanceNorm2d, "affine": True, "eps": eps, "requires_grad": norm_cfg.get("requires_grad", True)}
    return build_norm_layer(cfg, num_features)[1]
