"""Deformable convolution in plain PyTorch: bilinear sampling followed by a matrix product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from resbackbone.layers.tracing import is_recording

_BAG_DEVICES = ("cpu", "cuda")  # devices that are known to support embedding bags


class Geometry(NamedTuple):
    """Stride, padding and dilation in pixels as (vertical, horizontal), and mmcv's images per step."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    im2col_step: int


def sample_and_multiply(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, geometry: Geometry
) -> Tensor:
    """Compute :func:`~resbackbone.layers.deform_operator.deform_conv2d` on any device and dtype."""
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


def _sample(x: Tensor, offset: Tensor, mask: Tensor | None, kernel_size: Sequence[int], geometry: Geometry) -> Tensor:
    """Sample the image at the shifted positions of the kernel.

    Not by ``grid_sample``: positions scaled to -1..1 lose precision.

    Returns:
        ``(N * H' * W' * kh * kw * deform_groups, C / deform_groups)``, at least in float32: fewer bits cannot represent
        positions in pixels.
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
    # With a border of zeros, one pixel wide, every position has four neighbors.
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
    """Return weighted sums of four rows of the table, given by index and weight, ``(positions, 4)`` each."""
    # Not in ONNX, where an embedding bag becomes a slow loop.
    if is_recording() or table.device.type not in _BAG_DEVICES:
        reads = [table.index_select(0, corners[:, k]) * shares[:, k, None] for k in range(4)]
        return reads[0] + reads[1] + reads[2] + reads[3]
    # It never stores the four rows, each as large as the result: several times faster, a quarter of the memory.
    return F.embedding_bag(corners, table, per_sample_weights=shares, mode="sum")


def _kernel_positions(axis: int, size: int, points: int, geometry: Geometry, like: Tensor) -> Tensor:
    """Return the positions of the kernel without offsets, in pixels along one axis, ``(size, points)``."""
    start = torch.arange(size, device=like.device, dtype=like.dtype) * geometry.stride[axis] - geometry.padding[axis]
    point = torch.arange(points, device=like.device, dtype=like.dtype) * geometry.dilation[axis]
    return start[:, None] + point


def _split(position: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Split positions along one axis into the index of the pixel before, counted from the border, and the fraction."""
    # Positions far outside, and NaN, become -1: the border has all the weight there, and the gradient is zero.
    position = torch.where((position > -1) & (position < size), position, -1.0)
    before = position.detach().floor()
    return before.long() + 1, position - before
