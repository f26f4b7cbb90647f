"""The operator of deformable convolution, v1 and v2, with three backends."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from resbackbone.layers.deform_sampling import Geometry, sample_and_multiply
from resbackbone.layers.tracing import is_tracing
from resbackbone.utils.validation import check_choice

Backend = Literal["auto", "mmcv", "torchvision", "torch"]

_COMPILED_DTYPES = {
    "cpu": (torch.float32, torch.float64),
    "cuda": (torch.float16, torch.float32, torch.float64),
}
_NEEDED = {
    "mmcv": f"an mmcv or onedl-mmcv with operators compiled for torch {torch.__version__} (mmcv-lite has none)",
    "torchvision": f"the torchvision release that goes with torch {torch.__version__}, from the index torch came from",
}


def available_backends() -> tuple[str, ...]:
    """Return the available backends in the order in which ``"auto"`` prefers them; ``"torch"`` is always the last.

    >>> available_backends()[-1]
    'torch'
    """
    return (*(name for name in _NEEDED if compiled_devices(name)), "torch")


def check_backend(backend: Backend) -> None:
    """Raise ValueError if ``backend`` is unknown or not available."""
    check_choice("backend", backend, get_args(Backend))
    if backend != "auto" and backend not in available_backends():
        raise ValueError(
            f"`backend` {backend!r} does not run here, only {', '.join(map(repr, available_backends()))}; "
            f"use 'auto' or install {_NEEDED[backend]}"
        )


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
    """Convolve at shifted positions, with bilinear interpolation between pixels and zeros outside the image.

    All tensors are cast to the dtype of ``offset``, which is that of autocast, if it is enabled.

    Args:
        x: ``(N, C, H, W)``.
        offset: Offsets in pixels, ``(N, deform_groups * 2 * kh * kw, H', W')``, in the order y0, x0, y1, x1, ... per
            group.
        weight: ``(out_channels, C / groups, kh, kw)``.
        bias: ``(out_channels,)``.
        mask: Modulation, ``(N, deform_groups * kh * kw, H', W')``; None for ones.
        stride: Stride in pixels.
        padding: Zeros added on each side, in pixels.
        dilation: Dilation in pixels.
        im2col_step: Maximum number of images that mmcv's operator processes at a time; the largest divisor of N up to
            it is used.
        backend: "mmcv" and "torchvision" are compiled operators, "torch" is plain PyTorch (every device and dtype,
            ``torch.compile``, ``torch.export``), "auto" the first of them that supports these tensors.

    Returns:
        ``(N, out_channels, H', W')``.

    Source: Dai et al., arXiv:1703.06211, section 2.1; with a mask Zhu et al., arXiv:1811.11168, section 3.2.
    """
    tensors = [None if tensor is None else tensor.to(offset.dtype) for tensor in (x, offset, weight, bias, mask)]
    operator = _OPERATORS[choose_backend(offset) if backend == "auto" else backend]
    return operator(*tensors, Geometry(stride, padding, dilation, im2col_step))


def choose_backend(offset: Tensor) -> str:
    """Return the backend of ``"auto"`` for a tensor: the first that supports its device and dtype."""
    # Compiled operators cannot be traced, and do not support tensor subclasses (fake, distributed).
    if torch.compiler.is_compiling() or is_tracing() or type(offset) is not Tensor:
        return "torch"
    device = offset.device.type
    if offset.dtype in _COMPILED_DTYPES.get(device, ()):
        for name in _NEEDED:
            if device in compiled_devices(name):
                return name
    return "torch"


@cache
def compiled_devices(backend: str) -> tuple[str, ...]:
    """Return the device types that a backend's compiled operator supports: none if it cannot be imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of third parties do not matter here
        try:
            return _mmcv_devices() if backend == "mmcv" else _torchvision_devices()
        except Exception:  # operators built for another torch raise ImportError, OSError, RuntimeError, ...
            return ()


def _mmcv_devices() -> tuple[str, ...]:
    from mmcv import ops

    return ("cpu",) if ops.get_compiling_cuda_version() == "not available" else ("cpu", "cuda")


def _torchvision_devices() -> tuple[str, ...]:
    import torchvision.ops  # noqa: F401  # registers the operator

    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return tuple(device for device in ("cpu", "cuda") if has_kernel("torchvision::deform_conv2d", device.upper()))


def _run_mmcv(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, geometry: Geometry
) -> Tensor:
    images, channels, height, width = x.shape
    kernel_height, kernel_width = weight.shape[2:]
    # Both operators fail for an empty batch, that of v1 also for an image smaller than the kernel.
    if images == 0 or (mask is None and (height < kernel_height or width < kernel_width)):
        return sample_and_multiply(x, offset, weight, bias, mask, geometry)
    from mmcv import ops

    deform_groups = offset.shape[1] // (2 * kernel_height * kernel_width)
    shared = (geometry.stride, geometry.padding, geometry.dilation, channels // weight.shape[1], deform_groups)
    # They need the contiguous memory format.
    x, offset, weight = x.contiguous(), offset.contiguous(), weight.contiguous()
    out: Tensor
    if mask is not None:
        out = ops.modulated_deform_conv2d(x, offset, mask.contiguous(), weight, bias, *shared)
        return out
    step = max(n for n in range(1, min(geometry.im2col_step, images) + 1) if images % n == 0)
    out = ops.deform_conv2d(x, offset, weight, *shared, False, step)
    return out if bias is None else out + bias[:, None, None]


def _run_torchvision(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, geometry: Geometry
) -> Tensor:
    from torchvision import ops

    stride, padding, dilation, _ = geometry
    out: Tensor = ops.deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask)
    return out


_OPERATORS: dict[str, Callable[..., Tensor]] = {
    "mmcv": _run_mmcv,
    "torchvision": _run_torchvision,
    "torch": sample_and_multiply,
}
