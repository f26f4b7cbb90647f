"""Deformable convolution layers, v1 and v2."""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from resbackbone.layers.deform_operator import Backend, available_backends, check_backend, deform_conv2d
from resbackbone.registry import MODELS, register_kind
from resbackbone.utils.validation import check_count, check_flag, check_int, check_ints, warn_user

__all__ = ["DeformConv2d", "ModulatedDeformConv2d", "Pair", "available_backends", "deform_conv2d", "rename_old_offsets"]

Pair = int | tuple[int, int]


@register_kind("convolution")
@MODELS.register_module("DCN")
class DeformConv2d(nn.Module):
    """Deformable convolution: a second convolution predicts an offset for every point of the kernel.

    Offsets are initialized to zero, which gives the result of ``nn.Conv2d``. Its state dict has the keys of mmcv's
    ``DeformConv2dPack``. For old checkpoints see :func:`rename_old_offsets`.

    Args:
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        kernel_size: Sides of the kernel in pixels, one number or (vertical, horizontal), as in the next three.
        stride: Stride in pixels.
        padding: Zeros added on each side, in pixels.
        dilation: Dilation in pixels.
        groups: Groups of channels that are convolved separately.
        deform_groups: Groups of input channels with separate offsets.
        bias: Whether to add a learnable bias.
        im2col_step: Maximum number of images that mmcv's operator processes at a time; ignored by other backends.
        deformable_groups: Deprecated name of ``deform_groups``.
        backend: Implementation, see :func:`~resbackbone.layers.deform_operator.deform_conv2d`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the groups do not divide the channels, or ``backend`` is unknown or not available.

    >>> layer = DeformConv2d(8, 16, 3, stride=2, padding=1)
    >>> layer(torch.zeros(1, 8, 32, 48)).shape
    torch.Size([1, 16, 16, 24])

    Source: Dai et al., Deformable Convolutional Networks, arXiv:1703.06211, section 2.1.
    """

    _version = 2  # as in mmcv, whose version 1 had other keys
    channels_per_point: ClassVar[int] = 2
    optional_keys: ClassVar[tuple[str, ...]] = ("conv_offset",)  # keys that a checkpoint may lack: initialized to zero
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = False,
        im2col_step: int = 32,
        *,
        deformable_groups: int | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _pair("kernel_size", kernel_size, low=1)
        self.stride = _pair("stride", stride, low=1)
        self.padding = _pair("padding", padding, low=0)
        self.dilation = _pair("dilation", dilation, low=1)
        self.groups = groups
        self.deform_groups = _current_name(deform_groups, deformable_groups)
        self.im2col_step = im2col_step
        self.backend: Backend = backend
        # Attributes of nn.Conv2d that code for any convolution reads.
        self.transposed = False
        self.output_padding = (0, 0)
        self.padding_mode = "zeros"
        self._check(in_channels, out_channels, groups, self.deform_groups, im2col_step)
        check_backend(backend)
        check_flag("bias", bias)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels)) if bias else None)
        offset_channels = self.deform_groups * self.channels_per_point * math.prod(self.kernel_size)
        self.conv_offset = nn.Conv2d(
            in_channels, offset_channels, self.kernel_size, self.stride, self.padding, self.dilation
        )
        self.reset_parameters()

    @classmethod
    def check_arguments(
        cls,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        *,
        groups: int = 1,
        deform_groups: int = 1,
        im2col_step: int = 32,
        deformable_groups: int | None = None,
        backend: Backend = "auto",
        **others: Any,
    ) -> None:
        """Raise the constructor's errors about invalid arguments without building anything."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # raised by the constructor
            deform_groups = _current_name(deform_groups, deformable_groups)
        cls._check(in_channels, out_channels, groups, deform_groups, im2col_step)
        check_backend(backend)

    @staticmethod
    def _check(in_channels: int, out_channels: int, groups: int, deform_groups: int, im2col_step: int) -> None:
        given = dict(locals())
        for name, value in given.items():
            check_count(name, value, most=2**31 - 1)
        pairs = (("in_channels", "groups"), ("out_channels", "groups"), ("in_channels", "deform_groups"))
        for channels, parts in pairs:
            if given[channels] % given[parts]:
                raise ValueError(f"`{parts}` must divide `{channels}` (={given[channels]}), got {given[parts]}")

    def reset_parameters(self) -> None:
        """Initialize the weight as mmcv does, and the bias and the offsets to zero."""
        self._draw_weight()
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.init_weights()

    def _draw_weight(self) -> None:
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def init_weights(self) -> None:
        """Zero the offsets; mmengine calls this after the ``init_cfg`` of a parent has initialized every ``Conv2d``."""
        for parameter in self.conv_offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``, H' and W' as in ``nn.Conv2d``."""
        return self._convolve(x, self.conv_offset(x), None)

    def _convolve(self, x: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
        return deform_conv2d(
            x,
            offset,
            self.weight,
            self.bias,
            mask,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            im2col_step=self.im2col_step,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Show the arguments in ``repr``."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"deform_groups={self.deform_groups}, bias={self.bias is not None}, backend={self.backend!r}"
        )


@MODELS.register_module("DCNv2")
class ModulatedDeformConv2d(DeformConv2d):
    """Modulated deformable convolution: each point of the kernel also has a learned weight from 0 to 1.

    All of them are initialized to 0.5. Its state dict has the keys of mmcv's ``ModulatedDeformConv2dPack``.

    Args:
        in_channels, out_channels, ...: As for :class:`DeformConv2d`, without its ``im2col_step``.
        deform_groups: Groups of input channels with separate offsets and modulation.
        bias: Whether to add a learnable bias.

    Raises:
        TypeError, ValueError: As for :class:`DeformConv2d`.

    Source: Zhu et al., Deformable ConvNets v2, arXiv:1811.11168, section 3.2.
    """

    channels_per_point = 3

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = True,
        *,
        deformable_groups: int | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            deform_groups,
            bias,
            deformable_groups=deformable_groups,
            backend=backend,
        )

    def _draw_weight(self) -> None:
        bound = 1 / math.sqrt(self.in_channels * math.prod(self.kernel_size))
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``, H' and W' as in ``nn.Conv2d``."""
        masks = self.deform_groups * math.prod(self.kernel_size)
        offset, mask = self.conv_offset(x).split((2 * masks, masks), dim=1)
        return self._convolve(x, offset, mask.sigmoid())


def rename_old_offsets(module: nn.Module, state_dict: dict[str, Any], prefix: str = "", *unused: Any) -> None:
    """Rename ``conv2_offset.*``, as old checkpoints have it, to ``conv2.conv_offset.*``, in place.

    A layer cannot do so itself, since ``load_state_dict`` passes it only keys with its own prefix (mmcv's layers try,
    without effect since torch 1.13). Register it on the parent module:
    ``block.register_load_state_dict_pre_hook(rename_old_offsets)``; or call it with a state dict before loading.

    Args:
        module: A module that contains the deformable convolutions, at any depth.
        state_dict: The checkpoint's tensors by key. Existing new keys are kept.
        prefix: Prefix of the module's keys.
        unused: Further arguments of a hook.
    """
    modules = dict(module.named_modules())
    for name, layer in modules.items():
        if isinstance(layer, DeformConv2d) and f"{name}_offset" not in modules:
            for part in ("weight", "bias"):
                old, new = f"{prefix}{name}_offset.{part}", f"{prefix}{name}.conv_offset.{part}"
                if old in state_dict and new not in state_dict:
                    state_dict[new] = state_dict.pop(old)


def _pair(name: str, value: Pair, *, low: int) -> tuple[int, int]:
    if isinstance(value, int):
        value = (value, value)
    vertical, horizontal = check_ints(name, value, low=low, length=2, why="vertical, horizontal")
    return vertical, horizontal


def _current_name(deform_groups: int, deformable_groups: int | None) -> int:
    if deformable_groups is None:
        return deform_groups
    warn_user("`deformable_groups` is deprecated, write `deform_groups`", FutureWarning)
    check_int("deformable_groups", deformable_groups, low=1)
    if deform_groups not in (1, deformable_groups):
        raise ValueError(
            f"`deform_groups` (={deform_groups}) and its deprecated name `deformable_groups` (={deformable_groups}) "
            "must not differ; give only `deform_groups`"
        )
    return deformable_groups
