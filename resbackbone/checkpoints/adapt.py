"""Adapt weights to a model whose input channels, norms or layers have other names or shapes."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resbackbone.data.preprocessing import TORCHVISION, Preprocessing
from resbackbone.layers.deform_conv import rename_old_offsets


@dataclass(frozen=True)
class Adapted:
    """Weights that fit a net.

    Attributes:
        tensors: By native key.
        expected: What they expect of an image; None where that cannot be said.
        notes: What was changed, in words.
    """

    tensors: dict[str, Tensor]
    expected: Preprocessing | None
    notes: tuple[str, ...]


def adapt(tensors: dict[str, Tensor], net: nn.Module, expected: Preprocessing, *, absorb: bool) -> Adapted:
    """Give weights the names that a net has for them, and its number of input channels.

    Args:
        tensors: By native key; not changed.
        net: The net that they are for.
        expected: What they expect of an image of three channels, or of one.
        absorb: Whether they shall take images normalized as torchvision's.
    """
    tensors = dict(tensors)
    rename_old_offsets(net, tensors)
    own = net.state_dict()
    notes = []
    for key in [key for key in tensors if key not in own]:
        grouped = re.sub(r"(^|\.)bn(?=\d\.)", r"\1gn", key)  # what everybody else calls bn1 though it is none
        if grouped in own:
            tensors[grouped] = tensors.pop(key)
    first = next((key for key in ("conv1.weight", "stem.0.weight") if key in tensors and tensors[key].dim() == 4), None)
    if first is None:
        return Adapted(tensors, expected, ())
    if absorb and expected != TORCHVISION and tensors[first].shape[1] == 3:
        what = f"{expected.order} and a deviation of {', '.join(f'{std:g}' for std in expected.std)}"
        tensors[first], expected = absorb_normalisation(tensors[first], expected)
        notes.append(f"{first} takes RGB and torchvision's deviations in place of {what}")
    given, wanted = tensors[first].shape[1], own[first].shape[1] if first in own else 0
    if wanted and given != wanted:
        tensors[first] = adapt_channels(tensors[first], wanted)
        notes.append(f"{first} takes {wanted} channels in place of {given}")
    return Adapted(tensors, _expected_of(wanted or given, trained=given, usual=expected), tuple(notes))


def _expected_of(channels: int, *, trained: int, usual: Preprocessing) -> Preprocessing | None:
    """Return the preprocessing for so many channels; it is known for three and one alone."""
    if channels == 1 and trained in (1, 3):
        return usual.gray()
    return usual if channels == trained == 3 else None


def adapt_channels(weight: Tensor, in_channels: int) -> Tensor:
    """Give a first convolution another number of input channels.

    For one channel the filters are summed up; otherwise they are repeated in turn and scaled by the old number over the
    new one. So fewer channels get the filters of the first ones, whatever these were: of 13 bands for 3 those of the
    first three bands, times 13/3.

    Args:
        weight: ``(C, c, K, K)``.
        in_channels: How many channels the images have.

    Returns:
        ``(C, in_channels, K, K)``.

    Source: timm 1.0.31 ``models/_manipulate.py`` and segmentation_models_pytorch, which agree.
    """
    trained = weight.shape[1]
    if in_channels == 1:
        return weight.sum(1, keepdim=True)
    return weight.repeat(1, -(-in_channels // trained), 1, 1)[:, :in_channels] * (trained / in_channels)


def absorb_normalisation(weight: Tensor, expected: Preprocessing) -> tuple[Tensor, Preprocessing]:
    """Make a first convolution take RGB images divided by torchvision's deviations, whatever it was trained on.

    It is exact at the borders, too: the zeros of the padding mean the mean before and after.

    Args:
        weight: ``(C, 3, K, K)``.
        expected: What it was trained on.

    Returns:
        The weight, and what it expects now: the same mean in the order RGB, and torchvision's deviations.
    """
    mean, std = expected.mean, expected.std
    if expected.order == "BGR":
        weight, mean, std = weight.flip(1), mean[::-1], std[::-1]
    scale = torch.tensor(TORCHVISION.std, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)
    absorbed = (weight.double() * scale[:, None, None]).to(weight.dtype)
    return absorbed, Preprocessing(mean=mean, std=TORCHVISION.std, order="RGB", size=expected.size)
