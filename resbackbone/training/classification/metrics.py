"""How often the right class is among the best guesses."""

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
    """Per cent of pictures whose class is among the ``k`` highest scores, and the mean cross-entropy.

    Of equal scores the class with the lower number comes first, as in ``argmax``; after a NaN comes everything.

    Args:
        topk: The values of k. One of at least the number of classes is always 100.
    """

    default_prefix = "accuracy"

    def __init__(self, topk: Sequence[int] = (1, 5)) -> None:
        super().__init__(collect_device="gpu")  # by the processes' own connection; "cpu" needs a common disk
        self.topk = check_ints("topk", topk, low=1)

    def process(self, data_batch: Mapping[str, Any], data_samples: Sequence[Mapping[str, Tensor]]) -> None:
        """Take in a batch.

        Args:
            data_batch: Has ``labels``, ``(N,)``.
            data_samples: For each picture its ``scores``, ``(K,)``.
        """
        scores = torch.stack([sample["scores"] for sample in data_samples]).float().cpu()
        labels = data_batch["labels"].cpu()
        losses = F.cross_entropy(scores, labels, reduction="none")
        self.results += zip(places(scores, labels).tolist(), losses.tolist(), strict=True)

    def compute_metrics(self, results: list[tuple[int, float]]) -> dict[str, float]:
        """Compute ``top1``, ``top5``, ... and ``cross_entropy`` from the results of all processes."""
        count = len(results)
        metrics = {f"top{k}": 100 * sum(place < k for place, _ in results) / count for k in self.topk}
        # Not "loss", of which mmengine's log shows the mean over earlier validations.
        return {**metrics, "cross_entropy": sum(loss for _, loss in results) / count}


def places(scores: Tensor, labels: Tensor) -> Tensor:
    """Return how many classes come before the right one.

    Args:
        scores: ``(N, K)``.
        labels: ``(N,)``.

    Returns:
        ``(N,)``, from 0 to K - 1, or K where its score is NaN.

    >>> places(torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 3.0]]), torch.tensor([2, 1])).tolist()
    [1, 1]
    """
    own = scores.gather(1, labels[:, None])
    lower = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    return torch.where(lower, ~(scores < own), ~(scores <= own)).sum(1)
