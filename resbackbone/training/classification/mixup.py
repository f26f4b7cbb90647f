"""Mixing the pictures of a batch: mixup and CutMix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resbackbone.utils.validation import check_number

_MOST = 1000  # of a beta distribution that still is one in double precision


class Mixing:
    """Mixes each picture with the one half a batch away, and their targets in the same proportion.

    That is another one also where a sampler shows each several times in a row. Where both kinds are asked for, a coin
    decides for each batch. Random numbers are PyTorch's global ones.

    Args:
        mixup: Both parameters of the beta distribution that the proportion of mixup comes from; 0 for none. Source:
            Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018.
        cutmix: The same for the area of CutMix. Source: Yun et al., CutMix, ICCV 2019.

    Raises:
        TypeError, ValueError: If one is no number, negative or above 1000, or both are 0.
    """

    def __init__(self, *, mixup: float = 0.0, cutmix: float = 0.0) -> None:
        self.mixup = check_number("mixup", mixup, low=0, high=_MOST)
        self.cutmix = check_number("cutmix", cutmix, low=0, high=_MOST)
        if self.mixup == self.cutmix == 0:
            raise ValueError("`mixup` and `cutmix` must not both be 0; without any mixing, give none")

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            images: ``(N, C, H, W)``.
            targets: ``(N, K)``.

        Returns:
            Both mixed; the given ones stay as they are.
        """
        coin = torch.rand(()).item()
        if self.cutmix and (not self.mixup or coin < 0.5):
            images, share = _cutmix(images, _beta(self.cutmix))
        else:
            share = _beta(self.mixup)
            images = images.lerp(_partners(images), share)
        return images, targets.lerp(_partners(targets), share)


def _partners(batch: Tensor) -> Tensor:
    return batch.roll(len(batch) // 2, 0)


def _beta(alpha: float) -> float:
    parameter = torch.tensor(alpha, dtype=torch.float64)
    return float(torch.distributions.Beta(parameter, parameter).sample())


def _cutmix(images: Tensor, share: float) -> tuple[Tensor, float]:
    """Put a rectangle of the other picture, with that share of the area, where its center falls; cut at the border."""
    height, width = images.shape[2:]
    side = math.sqrt(share)
    top, bottom = _span(height, side)
    left, right = _span(width, side)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = _partners(images)[:, :, top:bottom, left:right]
    return mixed, (bottom - top) * (right - left) / (height * width)


def _span(length: int, share: float) -> tuple[int, int]:
    centre = int(torch.randint(length, ()))
    half = round(length * share) // 2
    return max(centre - half, 0), min(centre + half, length)
