"""Losses of logits against targets that may be mixtures of classes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from resbackbone.registry import MODELS, register_kind
from resbackbone.utils.validation import check_number


@register_kind("loss")
@MODELS.register_module()
class CrossEntropy(nn.Module):
    """Softmax cross-entropy.

    Args:
        label_smoothing: Share of each target that is spread over all classes. Source: Szegedy et al., Rethinking the
            Inception Architecture for Computer Vision, CVPR 2016, section 7.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = check_number("label_smoothing", label_smoothing, low=0, high=1, below=True)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the mean over the batch.

        Args:
            logits: ``(N, K)``.
            targets: ``(N, K)``, each row adding up to 1.
        """
        return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)


@register_kind("loss")
@MODELS.register_module()
class BinaryCrossEntropy(nn.Module):
    """A yes or no for every class by itself, so that a mixed picture may be two classes at once.

    Args:
        label_smoothing: As for :class:`CrossEntropy`.
        threshold: Targets above it become 1 and all others 0; None leaves them as they are.

    Source: Wightman et al., ResNet strikes back, 2021, section 3.1.
    """

    def __init__(self, label_smoothing: float = 0.0, threshold: float | None = None) -> None:
        super().__init__()
        self.label_smoothing = check_number("label_smoothing", label_smoothing, low=0, high=1, below=True)
        self.threshold = None if threshold is None else check_number("threshold", threshold)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the mean over batch and classes; arguments as for :class:`CrossEntropy`."""
        targets = targets * (1 - self.label_smoothing) + self.label_smoothing / targets.shape[1]
        if self.threshold is not None:
            targets = (targets > self.threshold).to(targets.dtype)
        return F.binary_cross_entropy_with_logits(logits, targets)
