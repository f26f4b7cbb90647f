"""Every operator of mmcv that runs on CPUs and takes a feature map, on small inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Call = tuple[Callable[..., Any], list[Tensor]]  # what is called, and its feature maps; the first are differentiated


def _rand(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)))


ROIS = torch.tensor([[0, 1.0, 2.0, 12.0, 13.0], [1, 0.0, 0.0, 9.0, 7.0]])
ROTATED = torch.tensor([[0, 8.0, 8.0, 10.0, 6.0, 0.3], [1, 6.0, 7.0, 5.0, 9.0, -0.5]])


def operators() -> Iterator[tuple[str, Call]]:
    """Yield each operator's name and how it is called."""
    from mmcv import ops

    x = _rand(2, 8, 16, 16)
    yield "roi_align", (lambda x: ops.roi_align(x, ROIS, 3, 1.0, 2, "avg", True), [x])
    yield "roi_align max", (lambda x: ops.roi_align(x, ROIS, 3, 1.0, 2, "max", True), [x])
    yield "roi_pool", (lambda x: ops.roi_pool(x, ROIS, 3), [x])
    yield "prroi_pool", (lambda x: ops.prroi_pool(x, ROIS, (3, 3), 1.0), [x])
    yield "roi_align_rotated", (lambda x: ops.roi_align_rotated(x, ROTATED, 3, 1.0, 2, True, False), [x])
    yield "riroi_align_rotated", (lambda x: ops.riroi_align_rotated(x, ROTATED, 3, 1.0, 2, 8, False), [x])
    yield "deform_roi_pool", (lambda x: ops.deform_roi_pool(x, ROIS, None, (3, 3), 1.0, 2, 0.1), [x])
    yield "border_align", (lambda x: ops.border_align(x, _rand(2, 256, 4) * 8, 2), [x])
    points = _rand(2, 17) * 15
    points[:, 0] = torch.tensor([0.0, 1.0])
    yield "bezier_align", (lambda x: ops.bezier_align(x, points, (3, 4), 1.0, 2, True), [x])
    boxes = _rand(2, 16, 16, 5) * 8
    yield "rotated_feature_align", (lambda x: ops.rotated_feature_align(x, boxes, 0.5, 1), [x])
    weight = _rand(4, 8, 3, 3)
    offset, mask = _rand(2, 18, 16, 16), _rand(2, 9, 16, 16)
    yield "deform_conv2d", (lambda x, o, w: ops.deform_conv2d(x, o, w, 1, 1, 1, 1, 1), [x, offset, weight])
    yield (
        "modulated_deform_conv2d",
        (
            lambda x, o, m, w: ops.modulated_deform_conv2d(x, o, m, w, None, 1, 1, 1, 1, 1),
            [x, offset, mask, weight],
        ),
    )
    yield (
        "masked_conv2d",
        (
            lambda x, w: ops.masked_conv2d(x, (_rand(1, 16, 16) > 0.5).float(), w, torch.zeros(4), 1),
            [x[:1].clone(), weight],
        ),
    )
    yield "carafe", (lambda x, m: ops.carafe(x, m, 3, 1, 2), [x, _rand(2, 9, 32, 32)])
    yield "carafe_naive", (lambda x, m: ops.carafe_naive(x, m, 3, 1, 2), [x, _rand(2, 9, 32, 32)])
    for kind in ("collect", "distribute"):
        yield f"psa_mask {kind}", (ops.PSAMask(kind, (5, 5)), [_rand(2, 25, 16, 16)])
    yield "correlation", (ops.Correlation(max_displacement=1), [x, _rand(2, 8, 16, 16) + x])
    turns = torch.randint(1, 10, (1, 3, 3, 8), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    yield "active_rotated_filter", (lambda w: ops.active_rotated_filter(w.unsqueeze(2), turns), [_rand(4, 8, 3, 3)])
    yield "tin_shift", (lambda x: ops.tin_shift(x, torch.zeros(2, 4, dtype=torch.int32)), [_rand(2, 8, 4, 4)])
    yield "upfirdn2d", (lambda x: ops.upfirdn2d(x, _rand(4, 4), up=2, padding=1), [x])
    yield "bias_act", (lambda x: ops.bias_act(x, _rand(8), act="lrelu"), [x])
    yield "filtered_lrelu", (lambda x: ops.filtered_lrelu(x, _rand(4), _rand(4), _rand(8)), [x])
    yield "fused_bias_leakyrelu", (lambda x: ops.fused_bias_leakyrelu(x, torch.zeros(8)), [x])
    yield "SAConv2d", (_saconv(ops), [x])
    yield "SAConv2d deformable", (_saconv(ops, use_deform=True), [x])
    yield "CrissCrossAttention", (_seeded(lambda: ops.CrissCrossAttention(16)), [_rand(2, 16, 6, 7)])
    for mode in ("top", "bottom", "left", "right"):
        yield f"CornerPool {mode}", (ops.CornerPool(mode), [x])
    yield "point_sample", (lambda x: ops.point_sample(x, _rand(2, 5, 2)), [x])
    yield "SimpleRoIAlign", (lambda x: ops.SimpleRoIAlign((3, 3), 1.0)(x, ROIS), [x])
    yield (
        "sigmoid_focal_loss",
        (
            lambda x: ops.sigmoid_focal_loss(
                x.flatten(0, 2), torch.zeros(256, dtype=torch.long), 2.0, 0.25, None, "none"
            ),
            [x],
        ),
    )


def _seeded(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    torch.manual_seed(0)
    return make()


def _saconv(ops: Any, **options: Any) -> torch.nn.Module:
    return _seeded(lambda: ops.SAConv2d(8, 4, 3, padding=1, **options))


def run(name: str, memory_format: torch.memory_format) -> list[Tensor]:
    """Return an operator's outputs and the gradients of its feature maps, which are in a memory format."""
    call, maps = dict(operators())[name]
    maps = [x.contiguous(memory_format=memory_format).requires_grad_() for x in maps]
    outs = call(*maps)
    pull = _rand(*outs.shape)
    if outs.dim() == 4:
        pull = pull.contiguous(memory_format=memory_format)
    grads = torch.autograd.grad(outs, maps, pull, allow_unused=True)
    return [outs.detach(), *(grad for grad in grads if grad is not None)]
