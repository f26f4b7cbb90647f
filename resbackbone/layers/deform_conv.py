"""Deformable convolution, v1 and v2: the layers, and the operator on three interchangeable backends."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resbackbone.checks import check_choice, check_flag, check_int, check_ints
from resbackbone.registry import MODELS

Backend = Literal["auto", "mmcv", "torchvision", "torch"]
Pair = int | tuple[int, int]

_COMPILED_DTYPES = {
    "cpu": (torch.float32, torch.float64),
    "cuda": (torch.float16, torch.float32, torch.float64),
}
_NEEDED = {
    "mmcv": f"an mmcv or onedl-mmcv with operators compiled for torch {torch.__version__} (mmcv-lite has none)",
    "torchvision": f"the torchvision release that goes with torch {torch.__version__}, from the index torch came from",
}
_is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # torch 2.7


class _Geometry(NamedTuple):
    """How the kernel moves over the image, in pixels as (vertical, horizontal), and mmcv's images per step."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    im2col_step: int


def available_backends() -> tuple[str, ...]:
    """Return the backends that run here, in the order in which ``"auto"`` prefers them; ``"torch"`` always does.

    >>> available_backends()[-1]
    'torch'
    """
    return (*(name for name in _NEEDED if _compiled_devices(name)), "torch")


def deform_conv2d(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    im2col_step: int = 32,
    backend: Backend = "auto",
) -> Tensor:
    """Convolve at shifted positions. What lies outside the image is zero; between pixels, bilinear interpolation.

    Everything is cast to the offset's dtype first, which is the one that autocast chose.

    Args:
        x: ``(N, C, H, W)``.
        offset: Shifts in pixels, ``(N, deform_groups * 2 * kh * kw, H', W')``, in the order y0, x0, y1, x1, ... per
            group.
        weight: ``(out_channels, C / groups, kh, kw)``.
        bias: ``(out_channels,)``.
        mask: Factor of every sample, ``(N, deform_groups * kh * kw, H', W')``; None for ones.
        stride: Step of the kernel in pixels.
        padding: Zeros added on each side, in pixels.
        dilation: Distance of the kernel's points in pixels.
        im2col_step: How many images mmcv's operator takes at a time, at most; the largest divisor of N is used.
        backend: "mmcv" and "torchvision" are compiled operators, "torch" is plain PyTorch (every device and dtype,
            ``torch.compile``, ``torch.export``), "auto" the first of them that takes these tensors.

    Returns:
        ``(N, out_channels, H', W')``.

    Source: Dai et al., arXiv:1703.06211, section 2.1; with a mask Zhu et al., arXiv:1811.11168, section 3.2.
    """
    tensors = [None if tensor is None else tensor.to(offset.dtype) for tensor in (x, offset, weight, bias, mask)]
    operator = _OPERATORS[_choose(offset) if backend == "auto" else backend]
    return operator(*tensors, _Geometry(stride, padding, dilation, im2col_step))


def _choose(offset: Tensor) -> str:
    # Tracers cannot look into a compiled operator, and tensor subclasses (fake, distributed) have no memory for it.
    if torch.compiler.is_compiling() or _is_tracing() or type(offset) is not Tensor:
        return "torch"
    device = offset.device.type
    if offset.dtype in _COMPILED_DTYPES.get(device, ()):
        for name in _NEEDED:
            if device in _compiled_devices(name):
                return name
    return "torch"


@cache
def _compiled_devices(backend: str) -> tuple[str, ...]:
    """Return the device types that a backend's compiled operator serves here: none where it cannot be imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a third party deprecates says nothing about whether it works
        try:
            return _mmcv_devices() if backend == "mmcv" else _torchvision_devices()
        except Exception:  # operators built for another torch fail in any way: ImportError, OSError, RuntimeError, ...
            return ()


def _mmcv_devices() -> tuple[str, ...]:
    from mmcv import ops

    return ("cpu",) if ops.get_compiling_cuda_version() == "not available" else ("cpu", "cuda")


def _torchvision_devices() -> tuple[str, ...]:
    import torchvision.ops  # noqa: F401  # registers the operator

    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return tuple(device for device in ("cpu", "cuda") if has_kernel("torchvision::deform_conv2d", device.upper()))


def _run_mmcv(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, geometry: _Geometry
) -> Tensor:
    images, channels, height, width = x.shape
    kernel_height, kernel_width = weight.shape[2:]
    # The operators refuse an empty batch, and that of v1 an image smaller than the kernel.
    if images == 0 or (mask is None and (height < kernel_height or width < kernel_width)):
        return _run_torch(x, offset, weight, bias, mask, geometry)
    from mmcv import ops

    deform_groups = offset.shape[1] // (2 * kernel_height * kernel_width)
    shared = (geometry.stride, geometry.padding, geometry.dilation, channels // weight.shape[1], deform_groups)
    # They read memory in NCHW order and refuse any other.
    x, offset, weight = x.contiguous(), offset.contiguous(), weight.contiguous()
    out: Tensor
    if mask is not None:
        out = ops.modulated_deform_conv2d(x, offset, mask.contiguous(), weight, bias, *shared)
        return out
    step = max(n for n in range(1, min(geometry.im2col_step, images) + 1) if images % n == 0)
    out = ops.deform_conv2d(x, offset, weight, *shared, False, step)
    return out if bias is None else out + bias[:, None, None]


def _run_torchvision(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, geometry: _Geometry
) -> Tensor:
    from torchvision import ops

    stride, padding, dilation, _ = geometry
    out: Tensor = ops.deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask)
    return out


def _run_torch(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, geometry: _Geometry
) -> Tensor:
    images = x.shape[0]
    out_channels, group_channels, *kernel_size = weight.shape
    out_size = offset.shape[2:]
    groups = x.shape[1] // group_channels
    points = math.prod(kernel_size)
    samples = _sample(x, offset, mask, kernel_size, geometry).to(x.dtype)
    samples = samples.reshape(images, out_size[0] * out_size[1], points, groups, group_channels)
    kernel = weight.reshape(groups, out_channels // groups, group_channels, points)
    out = torch.einsum("nlpgc,gocp->ngol", samples, kernel).reshape(images, out_channels, *out_size).contiguous()
    return out if bias is None else out + bias[:, None, None]


def _sample(x: Tensor, offset: Tensor, mask: Tensor | None, kernel_size: Sequence[int], geometry: _Geometry) -> Tensor:
    """Read the image where the kernel's points fall.

    ``grid_sample`` would want positions scaled to 0-1, which costs precision.

    Returns:
        ``(N * H' * W' * kh * kw * deform_groups, C / deform_groups)``, in float32 at least: fewer bits do not hold a
        position in pixels.
    """
    images, channels, height, width = x.shape
    groups = offset.shape[1] // (2 * math.prod(kernel_size))
    dtype = torch.promote_types(offset.dtype, torch.float32)
    out_size = offset.shape[2:]
    shift = offset.to(dtype).reshape(images, groups, *kernel_size, 2, *out_size)
    shift = shift.permute(4, 0, 5, 6, 2, 3, 1)  # (2, N, H', W', kh, kw, groups)
    rows, columns = (_kernel_positions(axis, out_size[axis], kernel_size[axis], geometry, shift) for axis in (0, 1))
    top, down = _split(shift[0] + rows[:, None, :, None, None], height)
    left, right = _split(shift[1] + columns[:, None, :, None], width)
    # A border of zeros, one pixel wide, gives every position four neighbours.
    height, width = height + 2, width + 2
    table = F.pad(x.to(dtype).permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    table = table.reshape(images * height * width * groups, channels // groups)
    image = torch.arange(images, device=x.device).reshape(images, 1, 1, 1, 1, 1)
    first = ((image * height + top) * width + left) * groups + torch.arange(groups, device=x.device)
    corners = torch.stack([first + step * groups for step in (0, 1, width, width + 1)], -1)
    shares = torch.stack([(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right], -1)
    if mask is not None:
        factors = mask.to(dtype).reshape(images, groups, *kernel_size, *out_size).permute(0, 4, 5, 2, 3, 1)
        shares = shares * factors[..., None]
    return _mix_rows(table, corners.flatten(0, -2), shares.flatten(0, -2))


def _mix_rows(table: Tensor, corners: Tensor, shares: Tensor) -> Tensor:
    """Add up four rows of the table for every position, ``(positions, 4)`` of them by index and share."""
    # ONNX makes a loop of an embedding bag, far slower than plain reads; devices other than these may not have one.
    if _is_exporting() or _is_tracing() or table.device.type not in _COMPILED_DTYPES:
        reads = [table.index_select(0, corners[:, k]) * shares[:, k, None] for k in range(4)]
        return reads[0] + reads[1] + reads[2] + reads[3]
    # Neither pass keeps the four reads, each as large as the result: several times faster, a quarter of the memory.
    return F.embedding_bag(corners, table, per_sample_weights=shares, mode="sum")


def _kernel_positions(axis: int, size: int, points: int, geometry: _Geometry, like: Tensor) -> Tensor:
    """Return where the kernel's points are without offsets, in pixels along one axis, ``(size, points)``."""
    start = torch.arange(size, device=like.device, dtype=like.dtype) * geometry.stride[axis] - geometry.padding[axis]
    point = torch.arange(points, device=like.device, dtype=like.dtype) * geometry.dilation[axis]
    return start[:, None] + point


def _split(position: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Split positions along one axis into the pixel before, counted from the zero border, and the rest in 0-1."""
    # What is far outside, or NaN, becomes -1: the border has all the weight there, and no gradient comes back.
    position = torch.where((position > -1) & (position < size), position, -1.0)
    before = position.detach().floor()
    return before.long() + 1, position - before


_OPERATORS: dict[str, Callable[..., Tensor]] = {
    "mmcv": _run_mmcv,
    "torchvision": _run_torchvision,
    "torch": _run_torch,
}


@MODELS.register_module("DCN")
class DeformConv2d(nn.Module):
    """A convolution that learns where to look: a second, plain one predicts a shift for every point of its kernel.

    It takes the place of ``nn.Conv2d`` and, with offsets of zero as at the start, computes the same. Its state dict is
    that of mmcv's ``DeformConv2dPack``. For old checkpoints see :func:`rename_old_offsets`.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out.
        kernel_size: Sides of the kernel in pixels, one number or (vertical, horizontal), as in the next three.
        stride: Step of the kernel in pixels.
        padding: Zeros added on each side, in pixels.
        dilation: Distance of the kernel's points in pixels.
        groups: Parts into which channels are split that do not see each other.
        deform_groups: Parts of the input channels that have offsets of their own.
        bias: Whether to add a learnable bias.
        im2col_step: How many images mmcv's operator takes at a time, at most; the other backends need no such number.
        deformable_groups: Deprecated name of ``deform_groups``.
        backend: What computes it, see :func:`deform_conv2d`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the groups do not divide the channels, or ``backend`` is unknown or does not run here.

    >>> layer = DeformConv2d(8, 16, 3, stride=2, padding=1)
    >>> layer(torch.zeros(1, 8, 32, 48)).shape
    torch.Size([1, 16, 16, 24])

    Source: Dai et al., Deformable Convolutional Networks, arXiv:1703.06211, section 2.1.
    """

    _version = 2  # as in mmcv, whose version 1 had other names
    channels_per_point: ClassVar[int] = 2
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
        # What code that handles any convolution asks for.
        self.transposed = False
        self.output_padding = (0, 0)
        self.padding_mode = "zeros"
        self._check()
        check_flag("bias", bias)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels)) if bias else None)
        offset_channels = self.deform_groups * self.channels_per_point * math.prod(self.kernel_size)
        self.conv_offset = nn.Conv2d(
            in_channels, offset_channels, self.kernel_size, self.stride, self.padding, self.dilation
        )
        self.reset_parameters()

    def _check(self) -> None:
        for name in ("in_channels", "out_channels", "groups", "deform_groups", "im2col_step"):
            check_int(name, getattr(self, name), low=1)
        for channels, groups in (("in", "groups"), ("out", "groups"), ("in", "deform_groups")):
            total, parts = getattr(self, f"{channels}_channels"), getattr(self, groups)
            if total % parts:
                raise ValueError(f"`{groups}` must divide `{channels}_channels` (={total}), got {parts}")
        check_choice("backend", self.backend, get_args(Backend))
        if self.backend != "auto" and self.backend not in available_backends():
            raise ValueError(
                f"`backend` {self.backend!r} does not run here, only {', '.join(map(repr, available_backends()))}; "
                f"use 'auto' or install {_NEEDED[self.backend]}"
            )

    def reset_parameters(self) -> None:
        """Draw the weight anew as mmcv does, and zero the bias and the offsets."""
        self._draw_weight()
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.init_weights()

    def _draw_weight(self) -> None:
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def init_weights(self) -> None:
        """Zero the offsets again; mmengine calls this after a parent's ``init_cfg`` has drawn every ``Conv2d``."""
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
        """Show the geometry and the backend in ``repr``."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"deform_groups={self.deform_groups}, bias={self.bias is not None}, backend={self.backend!r}"
        )


@MODELS.register_module("DCNv2")
class ModulatedDeformConv2d(DeformConv2d):
    """A deformable convolution that also learns how much each shifted point counts, a factor in 0-1.

    At the start all factors are 0.5. Its state dict is that of mmcv's ``ModulatedDeformConv2dPack``.

    Args:
        in_channels, out_channels, ...: As for :class:`DeformConv2d`, without its ``im2col_step``.
        deform_groups: Parts of the input channels that have offsets and factors of their own.
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

    A layer cannot do so itself: ``load_state_dict`` shows it only the keys that begin with its own name. (mmcv's layers
    try, in vain since torch 1.13.) So this is made for the module around it, as a hook:
    ``block.register_load_state_dict_pre_hook(rename_old_offsets)``; or call it with a state dict before loading.

    Args:
        module: What contains the deformable convolutions, at any depth.
        state_dict: The checkpoint's tensors by key. Keys that the module has as well stay.
        prefix: What stands before the module's own names in the keys.
        unused: What torch gives a hook besides.
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
    warnings.warn("`deformable_groups` is deprecated, write `deform_groups`", FutureWarning, stacklevel=3)
    if deform_groups not in (1, deformable_groups):
        raise ValueError(
            f"`deform_groups` (={deform_groups}) and its deprecated name `deformable_groups` (={deformable_groups}) "
            "must not differ; give only `deform_groups`"
        )
    return deformable_groups
