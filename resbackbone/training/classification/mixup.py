"""mixup and CutMix augmentation of a batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resbackbone.utils.validation import check_number

_MAX_ALPHA = 1000  # beyond it, sampling the beta distribution loses precision


class MixupCutmix:
    """Mixes each image with the one half a batch away, by mixup or CutMix, and the targets in the same proportion.

    That is a different picture even if the sampler repeats each picture several times in a row. If both are enabled,
    one is chosen at random for each batch. Random numbers come from PyTorch's global generator.

    Args:
        mixup_alpha: Both parameters of the beta distribution of the mixing ratio of mixup; 0 disables mixup. Source:
            Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018.
        cutmix_alpha: The same for the area ratio of CutMix. Source: Yun et al., CutMix, ICCV 2019.

    Raises:
        TypeError, ValueError: If one is not a number from 0 to 1000, or both are 0.
    """

    def __init__(self, *, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0) -> None:
        self.mixup_alpha = check_number("mixup_alpha", mixup_alpha, low=0, high=_MAX_ALPHA)
        self.cutmix_alpha = check_number("cutmix_alpha", cutmix_alpha, low=0, high=_MAX_ALPHA)
        if self.mixup_alpha == self.cutmix_alpha == 0:
            raise ValueError("`mixup_alpha` and `cutmix_alpha` must not both be 0; omit them to disable both")

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            images: ``(N, C, H, W)``.
            targets: ``(N, K)``.

        Returns:
            The mixed images and targets, as new tensors.
        """
        coin = torch.rand(()).item()
        if self.cutmix_alpha and (not self.mixup_alpha or coin < 0.5):
            images, ratio = _cutmix(images, _sample_beta(self.cutmix_alpha))
        else:
            ratio = _sample_beta(self.mixup_alpha)
            images = images.lerp(_partners(images), ratio)
        return images, targets.lerp(_partners(targets), ratio)


def _partners(batch: Tensor) -> Tensor:
    return batch.roll(len(batch) // 2, 0)


def _sample_beta(alpha: float) -> float:
    parameter = torch.tensor(alpha, dtype=torch.float64)
    return float(torch.distributions.Beta(parameter, parameter).sample())


def _cutmix(images: Tensor, ratio: float) -> tuple[Tensor, float]:
    """Paste a random box of the partner image; return the images and the box's share of the area after clipping."""
    height, width = images.shape[2:]
    side = math.sqrt(ratio)
    top, bottom = _random_span(height, side)
    left, right = _random_span(width, side)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = _partners(images)[:, :, top:bottom, left:right]
    return mixed, (bottom - top) * (right - left) / (height * width)


def _random_span(length: int, ratio: float) -> tuple[int, int]:
    center = int(torch.randint(length, ()))
    half = round(length * ratio) // 2
    return max(center - half, 0), min(center + half, length)
