"""Adapt weights to the model: names of norms and offsets, number of input channels, normalization of the images."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from resbackbone.checkpoints.conversion import FoundBackbone
from resbackbone.data.preprocessing import CAFFE, DETECTRON, INCEPTION, TORCHVISION, UNIT_RANGE, Preprocessing
from resbackbone.layers.deform_conv import rename_old_offsets


@dataclass(frozen=True)
class AdaptedWeights:
    """Weights with the names and the number of input channels of a model.

    Attributes:
        tensors: By native key.
        preprocessing: What the weights expect of an image; None if unknown.
        notes: The changes, in words.
    """

    tensors: dict[str, Tensor]
    preprocessing: Preprocessing | None
    notes: tuple[str, ...]


def adapt(
    tensors: dict[str, Tensor],
    net: nn.Module,
    preprocessing: Preprocessing,
    normalization: Literal["checkpoint", "torchvision"] = "checkpoint",
) -> AdaptedWeights:
    """Adapt weights to a model.

    Args:
        tensors: By native key; not changed.
        net: The model.
        preprocessing: What the weights expect of an image.
        normalization: "torchvision" to fold another normalization of three channels into the first convolution, so that
            the weights accept images normalized as for torchvision.
    """
    tensors = dict(tensors)
    rename_old_offsets(net, tensors)
    own = net.state_dict()
    notes = []
    for key in [key for key in tensors if key not in own]:
        group_norm = re.sub(r"(^|\.)bn(?=\d\.)", r"\1gn", key)  # other libraries call a group norm `bn1`, too
        if group_norm in own:
            tensors[group_norm] = tensors.pop(key)
    first = next((key for key in ("conv1.weight", "stem.0.weight") if key in tensors and tensors[key].dim() == 4), None)
    if first is None:
        return AdaptedWeights(tensors, preprocessing, ())
    if normalization == "torchvision" and preprocessing != TORCHVISION and tensors[first].shape[1] == 3:
        std = ", ".join(f"{value:g}" for value in preprocessing.std)
        notes.append(f"{first} accepts RGB with torchvision's std in place of {preprocessing.order} with std {std}")
        tensors[first], preprocessing = fold_normalization(tensors[first], preprocessing)
    trained, wanted = tensors[first].shape[1], own[first].shape[1] if first in own else 0
    if wanted and trained != wanted:
        tensors[first] = adapt_channels(tensors[first], wanted)
        notes.append(f"{first} accepts {wanted} channels in place of {trained}")
    return AdaptedWeights(
        tensors, _preprocessing_for(wanted or trained, trained=trained, usual=preprocessing), tuple(notes)
    )


def _preprocessing_for(channels: int, *, trained: int, usual: Preprocessing) -> Preprocessing | None:
    """Return the preprocessing for a number of channels; it is known for three and one only."""
    if channels == 1 and trained in (1, 3):
        return usual.gray()
    return usual if channels == trained == 3 else None


def adapt_channels(weight: Tensor, in_channels: int) -> Tensor:
    """Change the number of input channels of a first convolution.

    For one channel the filters are summed. Otherwise they are repeated in turn and scaled by the old number of channels
    over the new one. Fewer channels get the first filters: 13 bands become 3 by the filters of the first three bands,
    times 13/3.

    Args:
        weight: ``(C, c, K, K)``.
        in_channels: Channels of the images.

    Returns:
        ``(C, in_channels, K, K)``.

    Source: timm 1.0.31 ``models/_manipulate.py`` and segmentation_models_pytorch, which agree.
    """
    trained = weight.shape[1]
    if in_channels == 1:
        return weight.sum(1, keepdim=True)
    return weight.repeat(1, -(-in_channels // trained), 1, 1)[:, :in_channels] * (trained / in_channels)


def fold_normalization(weight: Tensor, preprocessing: Preprocessing) -> tuple[Tensor, Preprocessing]:
    """Fold channel order and std into a first convolution, which then accepts RGB images with torchvision's std.

    It is exact at the borders, too: zero padding stands for the mean before and after.

    Args:
        weight: ``(C, 3, K, K)``.
        preprocessing: What it was trained with.

    Returns:
        The weight, and what it expects now: the same mean in the order RGB, and torchvision's std.
    """
    mean, std = preprocessing.mean, preprocessing.std
    if preprocessing.order == "BGR":
        weight, mean, std = weight.flip(1), mean[::-1], std[::-1]
    scale = torch.tensor(TORCHVISION.std, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)
    folded = (weight.double() * scale[:, None, None]).to(weight.dtype)
    return folded, Preprocessing(mean=mean, std=TORCHVISION.std, order="RGB", size=preprocessing.size)


def usual_preprocessing(found: FoundBackbone, style: str) -> Preprocessing:
    """Return what weights in a key layout usually expect of an image, for a checkpoint that does not say it.

    Args:
        found: The backbone of the checkpoint.
        style: The ``style`` of the model: "caffe" or "pytorch".
    """
    layout = found.layout.name
    if layout == "caffe2":
        return DETECTRON
    if layout == "bit":
        return INCEPTION
    if layout in ("rtdetr", "huggingface") and "stem.0.weight" in found.native and _has_decoder(found.others):
        return UNIT_RANGE
    return CAFFE if layout == "detectron2" or style == "caffe" else TORCHVISION


def _has_decoder(names: tuple[str, ...]) -> bool:
    """Whether a checkpoint is a whole RT-DETR, which was trained with another normalization than its backbone."""
    return any("decoder" in name.split(".") for name in names)
