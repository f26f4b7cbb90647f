"""Top-k accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.evaluator import BaseMetric
from torch import Tensor

from resbackbone.registry import METRICS
from resbackbone.utils.validation import check_ints


@METRICS.register_module()
class Accuracy(BaseMetric):
    """Top-k accuracy in percent, and the mean cross-entropy.

    Among equal scores the lower class index ranks first, as in ``argmax``. A NaN score ranks last.

    Args:
        topk: The values of k. If k is at least the number of classes, the accuracy is always 100.
    """

    default_prefix = "accuracy"

    def __init__(self, topk: Sequence[int] = (1, 5)) -> None:
        super().__init__(collect_device="gpu")  # over the process group; "cpu" needs a shared disk
        self.topk = check_ints("topk", topk, low=1)

    def process(self, data_batch: Mapping[str, Any], data_samples: Sequence[Mapping[str, Tensor]]) -> None:
        """Add a batch.

        Args:
            data_batch: Its ``labels`` are ``(N,)``.
            data_samples: One dict per picture, with ``scores``, ``(K,)``.
        """
        scores = torch.stack([sample["scores"] for sample in data_samples]).float().cpu()
        labels = data_batch["labels"].cpu()
        losses = F.cross_entropy(scores, labels, reduction="none")
        self.results += zip(label_ranks(scores, labels).tolist(), losses.tolist(), strict=True)

    def compute_metrics(self, results: list[tuple[int, float]]) -> dict[str, float]:
        """Compute ``top1``, ``top5``, ... and ``cross_entropy`` from the results of all processes."""
        count = len(results)
        metrics = {f"top{k}": 100 * sum(rank < k for rank, _ in results) / count for k in self.topk}
        # Not named "loss": mmengine's logger would average that over earlier validations.
        return {**metrics, "cross_entropy": sum(loss for _, loss in results) / count}


def label_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the number of classes that rank above the label.

    Args:
        scores: ``(N, K)``.
        labels: ``(N,)``.

    Returns:
        ``(N,)``, from 0 to K - 1, or K if the label's score is NaN.

    >>> label_ranks(torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 3.0]]), torch.tensor([2, 1])).tolist()
    [1, 1]
    """
    own = scores.gather(1, labels[:, None])
    lower = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    return torch.where(lower, ~(scores < own), ~(scores <= own)).sum(1)
