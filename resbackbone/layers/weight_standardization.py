"""Weight standardization: convolutions with filters of a fixed mean and standard deviation."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from resbackbone.registry import MODELS
from resbackbone.utils.validation import check_number


class WeightStandardizedConv2d(nn.Conv2d):
    """Base class of convolutions that standardize their weight, filter by filter, in each forward pass.

    A subclass implements :meth:`standardized_weight`.

    Args:
        args: As for ``nn.Conv2d``.
        kwargs: As for ``nn.Conv2d``.

    Raises:
        ValueError: If a filter is a single number, which has no standard deviation.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``, as in ``nn.Conv2d``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check_filters(type(self).__name__, self.in_channels, self.kernel_size, self.groups)

    @classmethod
    def check_arguments(
        cls, in_channels: int, out_channels: int, kernel_size: Any, *, groups: int = 1, **others: Any
    ) -> None:
        """Raise the constructor's errors about invalid arguments without building anything."""
        _check_filters(cls.__name__, in_channels, kernel_size, groups)

    def standardized_weight(self) -> Tensor:
        """Return the standardized weight, of the weight's shape, which the input is convolved with."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""
        out: Tensor = self._conv_forward(input, self.standardized_weight(), self.bias)
        return out


def effective_weight(conv: nn.Conv2d) -> Tensor:
    """Return the weight that a convolution applies: the standardized weight if it has one, else ``conv.weight``."""
    return conv.standardized_weight() if isinstance(conv, WeightStandardizedConv2d) else conv.weight


# mmengine's `init_cfg` matches a layer by the names of its class and its direct bases, hence nn.Conv2d once more.
@MODELS.register_module("ConvWS")
class ConvWS2d(WeightStandardizedConv2d, nn.Conv2d):
    """A convolution with filters of mean 0 and standard deviation 1.

    Args:
        args: As for ``nn.Conv2d``.
        eps: Added to the standard deviation that is divided by.
        kwargs: As for ``nn.Conv2d``.

    Raises:
        ValueError: If a filter is a single number, which has no standard deviation.

    Source: Qiao et al., Micro-Batch Training with Batch-Channel Normalization and Weight Standardization,
    arXiv:1903.10520; numbers as in mmcv's ``ConvWS2d``.

    >>> layer = ConvWS2d(8, 4, 3)
    >>> bool((layer.standardized_weight().mean((1, 2, 3)).abs() < 1e-6).all())
    True
    """

    def __init__(self, *args: Any, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eps = check_number("eps", eps, low=0, high=1)

    @classmethod
    def check_arguments(cls, *args: Any, eps: float = 1e-5, **kwargs: Any) -> None:
        """Raise the constructor's errors about invalid arguments without building anything."""
        check_number("eps", eps, low=0, high=1)
        super().check_arguments(*args, **kwargs)

    def standardized_weight(self) -> Tensor:
        """Return the standardized weight, of the weight's shape, which the input is convolved with."""
        filters = self.weight.flatten(1)
        mean, deviation = filters.mean(1), filters.std(1)
        return (self.weight - _per_filter(mean)) / (_per_filter(deviation) + self.eps)


@MODELS.register_module("ConvAWS")
class ConvAWS2d(WeightStandardizedConv2d, nn.Conv2d):
    """A convolution with filters of mean ``weight_beta`` and standard deviation ``weight_gamma``.

    These buffers are 0 and 1 in a new layer. Loading a checkpoint of an ordinary convolution, which has neither, sets
    them to the mean and the standard deviation of its filters, so that the layer computes the same as that
    convolution; so does ``init_weights()`` after the filters are drawn. (mmcv keeps 0 and 1 then, with which a frozen
    batch norm lets the activations of a deep net grow to NaN.)

    Args:
        args: As for ``nn.Conv2d``.
        kwargs: As for ``nn.Conv2d``.

    Raises:
        ValueError: If a filter is a single number, which has no standard deviation.

    Source: Qiao et al., DetectoRS, arXiv:2006.02334; keys and numbers as in mmcv's ``ConvAWS2d``.

    >>> plain, adaptive = nn.Conv2d(8, 4, 3), ConvAWS2d(8, 4, 3)
    >>> adaptive.load_state_dict(plain.state_dict())
    <All keys matched successfully>
    >>> torch.allclose(adaptive.standardized_weight(), plain.weight, atol=1e-6)
    True
    """

    # Keys that a checkpoint may lack; loading computes them.
    optional_keys: ClassVar[tuple[str, ...]] = ("weight_gamma", "weight_beta")
    weight_gamma: Tensor
    weight_beta: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("weight_gamma", torch.ones(self.out_channels, 1, 1, 1))
        self.register_buffer("weight_beta", torch.zeros(self.out_channels, 1, 1, 1))

    def init_weights(self) -> None:
        """Set ``weight_beta`` and ``weight_gamma`` to the mean and standard deviation of the filters.

        mmengine calls this after a parent's ``init_cfg`` has drawn the filters.
        """
        mean, deviation = _mean_and_deviation(self.weight.detach())
        self.weight_beta.copy_(mean)
        self.weight_gamma.copy_(deviation)

    def standardized_weight(self) -> Tensor:
        """Return the standardized weight, of the weight's shape, which the input is convolved with."""
        mean, deviation = _mean_and_deviation(self.weight)
        return self.weight_gamma * ((self.weight - mean) / deviation) + self.weight_beta

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight = state_dict.get(f"{prefix}weight")
        names = [f"{prefix}weight_beta", f"{prefix}weight_gamma"]
        # The base class reports a weight of another shape as an error.
        if weight is not None and weight.shape == self.weight.shape and not any(name in state_dict for name in names):
            state_dict.update(zip(names, _mean_and_deviation(weight.detach().to(self.weight.dtype)), strict=True))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _mean_and_deviation(weight: Tensor) -> tuple[Tensor, Tensor]:
    filters = weight.flatten(1)
    # eps is added to the variance, not to the deviation: the gradient of the square root must stay finite.
    return _per_filter(filters.mean(1)), _per_filter(torch.sqrt(filters.var(1) + 1e-5))


def _per_filter(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _check_filters(name: str, in_channels: int, kernel_size: Any, groups: int) -> None:
    sides = kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size)
    if in_channels // groups * math.prod(sides) < 2:
        raise ValueError(
            f"{name} needs filters of at least 2 numbers to standardize, got `in_channels`={in_channels} in "
            f"`groups`={groups} and `kernel_size`={kernel_size}; use a plain Conv2d, or more `base_channels`"
        )
