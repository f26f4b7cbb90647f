"""A model of a host and the same model with our backbone, compared."""

from __future__ import annotations

import torch
from sweep_hosts import compare_tensors
from torch import nn


def compare_starts(native: nn.Module, ours: nn.Module) -> list[str]:
    """Compare what ``init_weights()`` makes of both models from one seed.

    Returns:
        One line per difference.
    """
    for model in (native, ours):
        torch.manual_seed(0)
        model.init_weights()  # type: ignore[operator]
    return compare_tensors("initial", native.state_dict(), ours.state_dict())
