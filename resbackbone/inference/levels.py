"""Feature levels of an exported model: which modules compute them, their names, channels and strides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resbackbone.backbones.base import Backbone
from resbackbone.backbones.feature_info import FeatureInfo
from resbackbone.inference.engines import Engine, copy_for_inference

# Sides in pixels of the image that strides are measured on: on the meta device, and where values must be computed.
_SIDE, _SMALL_SIDE = 1024, 256


class HeadlessModel(nn.Module):
    """The part of a model that computes feature maps, with a tuple of tensors as output.

    For a detector or segmentor that is its backbone, and its neck if it has one; for another model all of it.

    Args:
        net: A backbone, a model that calls one, or a detector with a ``backbone``.

    Raises:
        ValueError: If it contains no backbone, or one that `optimize` or `quantize` returned.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.in_channels = first_backbone(net).in_channels
        self.chain = nn.Sequential(*_without_heads(net, self.in_channels))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map images ``(N, in_channels, H, W)`` to one tensor per level."""
        return tuple(tensor for _, tensor in named_tensors(self.chain(images)))


def _without_heads(net: nn.Module, in_channels: int) -> list[nn.Module]:
    """Return the backbone and neck of a detector; for another model the model itself."""
    backbone = getattr(net, "backbone", None)
    if not isinstance(backbone, nn.Module):
        return [net]
    # OpenMMLab's detectors have `extract_feat`; other models are called to see whether they return feature maps.
    if not (hasattr(net, "extract_feat") or hasattr(net, "neck")) and _returns_feature_maps(net, in_channels):
        return [net]
    neck = getattr(net, "neck", None)
    return [backbone, neck] if isinstance(neck, nn.Module) else [backbone]


def first_backbone(net: nn.Module) -> Backbone:
    """Return the first backbone in a model."""
    if any(isinstance(module, Engine) for module in net.modules()):
        raise ValueError(
            f"{type(net).__name__} is or contains what `optimize` or `quantize` returned, which cannot be exported; "
            "export the original"
        )
    for module in net.modules():
        if isinstance(module, Backbone):
            return module
    raise ValueError(f"`net` must be a backbone or contain one, got {type(net).__name__}")


def named_tensors(outs: Any) -> list[tuple[str | None, Tensor]]:
    """Return the tensors in a model's output, with their names if it is a dict.

    Raises:
        ValueError: If it is no tensor, and no tuple, list or dict of tensors.
    """
    if isinstance(outs, Tensor):
        return [(None, outs)]
    if isinstance(outs, Mapping):
        named = [(str(key), value) for key, value in outs.items() if value is not None]
        if all(isinstance(value, Tensor) for _, value in named):
            return [(name, value) for name, value in named]
        if len(named) == 1:  # such as the feature maps of a transformers backbone
            return named_tensors(named[0][1])
    elif isinstance(outs, (tuple, list)) and all(isinstance(out, Tensor) for out in outs):
        return [(None, out) for out in outs]
    raise ValueError(f"a model must return a tensor, or a tuple, list or dict of them, got {type(outs).__name__}")


def infer_levels(net: nn.Module, headless: HeadlessModel) -> tuple[FeatureInfo, ...]:
    """Return name, channels and stride of each output, measured by running the model.

    Names are the keys of a dict; or the backbone's ``feature_info`` if channels and strides agree with it; or p2 for
    stride 4, p3 for stride 8 and so on. Outputs without height and width, such as logits, have stride 0.

    Args:
        net: The model.
        headless: The same without heads.
    """
    chain = headless.chain
    outs, side = _run_once(chain if len(chain) > 1 else chain[0], headless.in_channels)
    shapes = [(out.shape[1], _stride(out, side)) for _, out in outs]
    keys = [name for name, _ in outs]
    infos = first_backbone(net).feature_info
    if not any(keys) and shapes == [(info.channels, info.stride) for info in infos]:
        return infos
    names = _level_names(keys, [stride for _, stride in shapes])
    return tuple(
        FeatureInfo(name, index, *shape) for index, (name, shape) in enumerate(zip(names, shapes, strict=True))
    )


def _level_names(keys: Sequence[str | None], strides: Sequence[int]) -> Sequence[str]:
    named = [key for key in keys if key is not None]
    if len(named) == len(strides):
        return named
    if list(strides) == [0]:
        return ["logits"]
    by_stride = [f"p{stride.bit_length() - 1}" for stride in strides if stride and stride & (stride - 1) == 0]
    return by_stride if len(set(by_stride)) == len(strides) else [f"out{index}" for index in range(len(strides))]


def _stride(out: Tensor, side: int) -> int:
    return max(1, round(side / out.shape[2])) if out.dim() == 4 else 0


def _run_once(net: nn.Module, in_channels: int) -> tuple[list[tuple[str | None, Tensor]], int]:
    """Run a model on one square image, on the meta device if its layers allow that; return outputs and the side.

    Raises:
        ValueError: If the model does not run on images, or returns something else than tensors.
    """
    for device, side in (("meta", _SIDE), ("cpu", _SMALL_SIDE)):
        copied = copy_for_inference(net).float().to(device)
        try:
            with torch.no_grad():
                outs = copied(torch.zeros(1, in_channels, side, side, device=device))
            return named_tensors(outs), side
        except Exception as error:  # third-party layers raise errors of any class
            reason = error
    raise ValueError(f"{type(net).__name__} does not run on images (1, {in_channels}, {side}, {side}): {reason}")


def _returns_feature_maps(net: nn.Module, in_channels: int) -> bool:
    try:
        return bool(_run_once(net, in_channels)[0])
    except ValueError:
        return False
