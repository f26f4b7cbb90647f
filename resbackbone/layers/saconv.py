"""Switchable atrous convolution: two dilations of one kernel, blended pixel by pixel."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resbackbone.layers.deform_conv import Pair
from resbackbone.layers.deform_operator import Backend, check_backend, deform_conv2d
from resbackbone.layers.tracing import is_recording
from resbackbone.layers.weight_standardization import ConvAWS2d
from resbackbone.registry import MODELS
from resbackbone.utils.validation import check_flag, check_ints

LARGE_DILATION = 3  # the second dilation, in multiples of the first
WINDOW = 5  # side of the average pooling before the switch, in pixels

# Leaves for torch.fx, which cannot trace their use of sizes.
torch.fx.wrap("deform_conv2d")
torch.fx.wrap("_mirror")


# mmengine's `init_cfg` matches a layer by the names of its class and its direct bases, hence nn.Conv2d once more.
@MODELS.register_module("SAC")
class SAConv2d(ConvAWS2d, nn.Conv2d):
    """A convolution that blends, at every pixel, its dilation and three times that.

    Both dilations share a standardized weight, except for ``weight_diff``, which is initialized to zero. A projection
    of the global average is added before and after. A new layer uses the smaller dilation only.

    Args:
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        kernel_size: Sides of the kernel in pixels, one number or (vertical, horizontal), as in the next three.
        stride: Stride in pixels.
        padding: Zeros added on each side, in pixels; ``dilation * (kernel_size - 1) / 2``.
        dilation: The smaller dilation in pixels.
        groups: Groups of channels that are convolved separately.
        bias: Whether there is a parameter ``bias``. As in mmcv it has no effect; it does not train, and
            ``post_context.bias`` takes its place.
        use_deform: Make both convolutions deformable, which needs a 3x3 kernel.
        backend: Of deformable convolution, see :func:`~resbackbone.layers.deform_operator.deform_conv2d`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the padding changes the size, a deformable kernel is not 3x3, or ``backend`` does not run here.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, out_channels, ceil(H/stride), ceil(W/stride))``.

    Source: Qiao et al., DetectoRS, arXiv:2006.02334, section 4; keys and numbers as in mmcv's ``SAConv2d``.

    >>> layer = SAConv2d(8, 16, 3, stride=2, padding=1, bias=False, use_deform=True)
    >>> layer(torch.zeros(1, 8, 32, 48)).shape
    torch.Size([1, 16, 16, 24])
    """

    # Keys that a checkpoint may lack: as initialized, they have no effect.
    optional_keys: ClassVar[tuple[str, ...]] = (
        *ConvAWS2d.optional_keys,
        *("weight_diff", "switch", "pre_context", "post_context", "offset_s", "offset_l"),
    )

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        use_deform: bool = False,
        *,
        backend: Backend = "auto",
    ) -> None:
        check_flag("use_deform", use_deform)
        check_backend(backend)
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        check_ints("padding", self.padding, low=0, length=2, why="vertical, horizontal")
        _check_geometry(self.kernel_size, self.padding, self.dilation, use_deform)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.use_deform = use_deform
        self.backend: Backend = backend
        self.switch = nn.Conv2d(in_channels, 1, 1, stride)
        self.weight_diff = nn.Parameter(torch.empty_like(self.weight))
        self.pre_context = nn.Conv2d(in_channels, in_channels, 1)
        self.post_context = nn.Conv2d(out_channels, out_channels, 1)
        if use_deform:
            self.offset_s = nn.Conv2d(in_channels, 18, 3, stride, padding=1)
            self.offset_l = nn.Conv2d(in_channels, 18, 3, stride, padding=1)
        self._reset_switching()

    @classmethod
    def check_arguments(
        cls,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        *,
        padding: Any = 0,
        dilation: Any = 1,
        use_deform: bool = False,
        backend: Backend = "auto",
        **others: Any,
    ) -> None:
        """Raise the constructor's errors about invalid arguments without building anything."""
        super().check_arguments(in_channels, out_channels, kernel_size, **others)
        check_flag("use_deform", use_deform)
        check_backend(backend)
        sides, around, distances = (_pair(value) for value in (kernel_size, padding, dilation))
        _check_geometry(sides, around, distances, use_deform)

    def _reset_switching(self) -> None:
        """Initialize to the smaller dilation only, without context and offsets."""
        nn.init.zeros_(self.weight_diff)
        layers = [self.switch, self.pre_context, self.post_context]
        for layer in [*layers, self.offset_s, self.offset_l] if self.use_deform else layers:
            nn.init.zeros_(layer.weight)
            assert layer.bias is not None
            nn.init.constant_(layer.bias, 1.0 if layer is self.switch else 0.0)

    def init_weights(self) -> None:
        """Reset the switching; mmengine runs this after a parent's ``init_cfg`` has initialized every ``Conv2d``."""
        super().init_weights()
        self._reset_switching()

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, ceil(H/stride), ceil(W/stride))``."""
        x = input + self.pre_context(F.adaptive_avg_pool2d(input, 1))
        around = F.avg_pool2d(_mirror(x, WINDOW // 2), WINDOW, stride=1)
        switch = self.switch(around)
        weight = self.standardized_weight()
        small = self._convolve(x, weight, around, 1)
        large = self._convolve(x, weight + self.weight_diff, around, LARGE_DILATION)
        out: Tensor = switch * small + (1 - switch) * large
        context: Tensor = self.post_context(F.adaptive_avg_pool2d(out, 1))
        return out + context

    def _convolve(self, x: Tensor, weight: Tensor, around: Tensor, factor: int) -> Tensor:
        """Convolve with ``factor`` times the dilation; deformable offsets are computed from ``around``."""
        stride, padding, dilation = _times(1, self.stride), _times(factor, self.padding), _times(factor, self.dilation)
        if not self.use_deform:
            return F.conv2d(x, weight, None, stride, padding, dilation, self.groups)
        offset = (self.offset_s if factor == 1 else self.offset_l)(around)
        return deform_conv2d(x, offset, weight, stride=stride, padding=padding, dilation=dilation, backend=self.backend)


def _check_geometry(kernel_size: Any, padding: Any, dilation: Any, use_deform: bool) -> None:
    needed = [d * (k - 1) / 2 for d, k in zip(dilation, kernel_size, strict=True)]
    if list(padding) != needed:
        raise ValueError(
            "`padding` of a switchable atrous convolution must be `dilation` * (`kernel_size` - 1) / 2, so that "
            f"both dilations give one size, got {padding} for `dilation` {dilation} and `kernel_size` {kernel_size}"
        )
    if use_deform and kernel_size != (3, 3):
        raise ValueError(f"`kernel_size` must be 3 where `use_deform` is True, got {kernel_size}")


def _pair(value: Any) -> tuple[Any, Any]:
    return value if isinstance(value, tuple) else (value, value)


def _times(factor: int, pair: Any) -> tuple[int, int]:
    vertical, horizontal = pair
    return factor * vertical, factor * horizontal


def _mirror(x: Tensor, border: int) -> Tensor:
    """Pad by reflection, also maps that are smaller than the border, for which torch raises."""
    # Not in a traced graph, where the comparison would hold for the example's size only.
    if not is_recording() and min(x.shape[2:]) > border:
        return F.pad(x, (border, border, border, border), mode="reflect")
    for axis in (2, 3):
        size = x.shape[axis]
        period = (2 * torch.arange(size, device=x.device)[-1:]).clamp(min=1)
        # Reflected back and forth as often as needed.
        position = torch.arange(-border, size + border, device=x.device) % period
        x = x.index_select(axis, torch.minimum(position, period - position))
    return x
