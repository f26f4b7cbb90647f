"""Classification losses with soft targets."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from resbackbone.registry import MODELS, register_kind
from resbackbone.utils.validation import check_number


@register_kind("loss")
@MODELS.register_module()
class CrossEntropy(nn.Module):
    """Softmax cross-entropy loss.

    Args:
        label_smoothing: Share of each target that is distributed over all classes. Source: Szegedy et al., Rethinking
            the Inception Architecture for Computer Vision, CVPR 2016, section 7.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = check_number("label_smoothing", label_smoothing, low=0, high=1, below=True)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch.

        Args:
            logits: ``(N, K)``.
            targets: ``(N, K)``, with rows that sum to 1.
        """
        return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)


@register_kind("loss")
@MODELS.register_module()
class BinaryCrossEntropy(nn.Module):
    """Binary cross-entropy loss per class, so that a mixed image can belong to two classes.

    Args:
        label_smoothing: As for :class:`CrossEntropy`.
        threshold: Targets above it are set to 1 and all others to 0; None keeps them.

    Source: Wightman et al., ResNet strikes back, 2021, section 3.1.
    """

    def __init__(self, label_smoothing: float = 0.0, threshold: float | None = None) -> None:
        super().__init__()
        self.label_smoothing = check_number("label_smoothing", label_smoothing, low=0, high=1, below=True)
        self.threshold = None if threshold is None else check_number("threshold", threshold)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss over batch and classes; arguments as for :class:`CrossEntropy`."""
        targets = targets * (1 - self.label_smoothing) + self.label_smoothing / targets.shape[1]
        if self.threshold is not None:
            targets = (targets > self.threshold).to(targets.dtype)
        return F.binary_cross_entropy_with_logits(logits, targets)
