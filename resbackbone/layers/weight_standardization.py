"""Convolutions whose weights are standardized, filter by filter, each time they are used."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from resbackbone.registry import MODELS
from resbackbone.utils.validation import check_number


@MODELS.register_module("ConvWS")
class ConvWS2d(nn.Conv2d):
    """A convolution whose filters have mean 0 and standard deviation 1, whatever was learnt.

    Args:
        args: As for ``nn.Conv2d``.
        eps: Added to the standard deviation that is divided by.
        kwargs: As for ``nn.Conv2d``.

    Raises:
        ValueError: If a filter is a single number, which has no deviation.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``, as in ``nn.Conv2d``.

    Source: Qiao et al., Micro-Batch Training with Batch-Channel Normalization and Weight Standardization,
    arXiv:1903.10520; numbers as in mmcv's ``ConvWS2d``.

    >>> layer = ConvWS2d(8, 4, 3)
    >>> bool((layer.standardized_weight().mean((1, 2, 3)).abs() < 1e-6).all())
    True
    """

    def __init__(self, *args: Any, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check_filters(type(self).__name__, self.in_channels, self.kernel_size, self.groups)
        self.eps = check_number("eps", eps, low=0, high=1)

    @classmethod
    def check_arguments(
        cls, in_channels: int, out_channels: int, kernel_size: Any, *, groups: int = 1, eps: float = 1e-5, **others: Any
    ) -> None:
        """Raise ValueError or TypeError where the constructor would, but build nothing."""
        check_number("eps", eps, low=0, high=1)
        _check_filters(cls.__name__, in_channels, kernel_size, groups)

    def standardized_weight(self) -> Tensor:
        """Return the filters that are convolved with, of the weight's shape."""
        filters = self.weight.flatten(1)
        mean, deviation = filters.mean(1), filters.std(1)
        return (self.weight - _per_filter(mean)) / (_per_filter(deviation) + self.eps)

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""
        out: Tensor = self._conv_forward(input, self.standardized_weight(), self.bias)
        return out


@MODELS.register_module("ConvAWS")
class ConvAWS2d(nn.Conv2d):
    """A convolution whose filters have the mean ``weight_beta`` and the standard deviation ``weight_gamma``.

    These buffers are 0 and 1 in a new layer. An ordinary checkpoint, which has neither, sets them to what its filters
    have, so that the layer computes what it computed there; so does ``init_weights()`` with the filters just drawn.
    (mmcv leaves 0 and 1 then, at which a frozen batch norm lets the activations of a deep net grow to NaN.)

    Args:
        args: As for ``nn.Conv2d``.
        kwargs: As for ``nn.Conv2d``.

    Raises:
        ValueError: If a filter is a single number, which has no deviation.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``, as in ``nn.Conv2d``.

    Source: Qiao et al., DetectoRS, arXiv:2006.02334; keys and numbers as in mmcv's ``ConvAWS2d``.

    >>> plain, adaptive = nn.Conv2d(8, 4, 3), ConvAWS2d(8, 4, 3)
    >>> adaptive.load_state_dict(plain.state_dict())
    <All keys matched successfully>
    >>> torch.allclose(adaptive.standardized_weight(), plain.weight, atol=1e-6)
    True
    """

    neutral: ClassVar[tuple[str, ...]] = (
        "weight_gamma",
        "weight_beta",
    )  # what a checkpoint need not have: loading computes it
    weight_gamma: Tensor
    weight_beta: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check_filters(type(self).__name__, self.in_channels, self.kernel_size, self.groups)
        self.register_buffer("weight_gamma", torch.ones(self.out_channels, 1, 1, 1))
        self.register_buffer("weight_beta", torch.zeros(self.out_channels, 1, 1, 1))

    @classmethod
    def check_arguments(
        cls, in_channels: int, out_channels: int, kernel_size: Any, *, groups: int = 1, **others: Any
    ) -> None:
        """Raise ValueError where the constructor would, but build nothing."""
        _check_filters(cls.__name__, in_channels, kernel_size, groups)

    def init_weights(self) -> None:
        """Let the standardized filters be the filters; mmengine calls this after a parent's ``init_cfg`` drew them."""
        mean, deviation = _mean_and_deviation(self.weight.detach())
        self.weight_beta.copy_(mean)
        self.weight_gamma.copy_(deviation)

    def standardized_weight(self) -> Tensor:
        """Return the filters that are convolved with, of the weight's shape."""
        mean, deviation = _mean_and_deviation(self.weight)
        return self.weight_gamma * ((self.weight - mean) / deviation) + self.weight_beta

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""
        out: Tensor = self._conv_forward(input, self.standardized_weight(), self.bias)
        return out

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight = state_dict.get(f"{prefix}weight")
        names = [f"{prefix}weight_beta", f"{prefix}weight_gamma"]
        # Of another shape is an error that the base class reports.
        if weight is not None and weight.shape == self.weight.shape and not any(name in state_dict for name in names):
            state_dict.update(zip(names, _mean_and_deviation(weight.detach().to(self.weight.dtype)), strict=True))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _mean_and_deviation(weight: Tensor) -> tuple[Tensor, Tensor]:
    filters = weight.flatten(1)
    # The variance, not the deviation, is kept away from zero: the gradient of the root must not be infinite.
    return _per_filter(filters.mean(1)), _per_filter(torch.sqrt(filters.var(1) + 1e-5))


def _per_filter(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _check_filters(name: str, in_channels: int, kernel_size: Any, groups: int) -> None:
    sides = kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size)
    if in_channels // groups * math.prod(sides) < 2:
        raise ValueError(
            f"{name} needs filters of at least 2 numbers to standardise, got `in_channels`={in_channels} in "
            f"`groups`={groups} and `kernel_size`={kernel_size}; use a plain Conv2d, or more `base_channels`"
        )
