"""Preprocessing of pictures: channel order, mean and standard deviation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from resbackbone.utils.validation import check_choice, check_int, check_number, check_sequence

if TYPE_CHECKING:  # backbones import this module, and Pillow is needed only to read pictures
    from PIL import Image
    from torch import nn


MOST = 2**16 - 1  # the largest value of a 16-bit channel


@dataclass(frozen=True)
class Preprocessing:
    """Normalization that a backbone's weights expect of a picture.

    Attributes:
        mean: Mean of each channel, 0-255, in the order of ``order``; one value for grayscale.
        std: Standard deviation of each channel, 0-255.
        order: Channel order.
        size: Side of the square crops in pixels for the published accuracy; None if unknown.
    """

    mean: tuple[float, ...] = (123.675, 116.28, 103.53)
    std: tuple[float, ...] = (58.395, 57.12, 57.375)
    order: Literal["RGB", "BGR"] = "RGB"
    size: int | None = None

    def __post_init__(self) -> None:
        check_choice("order", self.order, ("RGB", "BGR"))
        mean = check_sequence("mean", self.mean)
        check_choice("len(mean)", len(mean), (1, 3))
        check_sequence("std", self.std, length=len(mean), why="as many as `mean`")
        for index, (middle, deviation) in enumerate(zip(mean, self.std, strict=True)):
            check_number(f"mean[{index}]", middle, low=-MOST, high=MOST)
            check_number(f"std[{index}]", deviation, low=0, high=MOST, above=True)
        if self.size is not None:
            check_int("size", self.size, low=1)

    def gray(self) -> Preprocessing:
        """Return the preprocessing for one gray channel: mean and std averaged over the channels."""
        mean, std = (sum(numbers) / len(numbers) for numbers in (self.mean, self.std))
        return Preprocessing(mean=(mean,), std=(std,), size=self.size)

    def __call__(self, picture: Image.Image) -> Tensor:
        """Normalize a picture.

        Args:
            picture: Of mode "RGB", or "L" if ``mean`` has one entry, as returned by
                :func:`resbackbone.data.pictures.read_picture`.

        Returns:
            ``(1, C, H, W)``, float32.

        Raises:
            ValueError: If the picture has another mode.
        """
        check_choice("picture.mode", picture.mode, ("L",) if len(self.mean) == 1 else ("RGB",))
        pixels = torch.from_numpy(np.array(picture)).reshape(picture.height, picture.width, -1)
        if self.order == "BGR":
            pixels = pixels.flip(2)
        return ((pixels - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(2, 0, 1).contiguous()[None]


TORCHVISION = Preprocessing()
CAFFE = Preprocessing(mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0), order="BGR")  # detectron2's values
DETECTRON = Preprocessing(mean=(102.9801, 115.9465, 122.7717), std=(1.0, 1.0, 1.0), order="BGR")  # Detectron's values

INCEPTION = Preprocessing(mean=(127.5,) * 3, std=(127.5,) * 3)  # -1 to 1, for BiT

UNIT_RANGE = Preprocessing(mean=(0.0,) * 3, std=(255.0,) * 3)  # 0 to 1, for whole RT-DETR models


def preprocessing_for(*, in_channels: int, style: str) -> Preprocessing:
    """Return the default preprocessing; for one channel, the averages over the color channels.

    Args:
        in_channels: Input channels of the backbone.
        style: The backbone's ``style``: "caffe" for weights converted from Caffe, "pytorch" otherwise.

    Raises:
        ValueError: If ``in_channels`` is neither 1 nor 3.
    """
    if in_channels not in (1, 3):
        raise ValueError(
            f"pictures have 1 or 3 channels, the backbone's `in_channels` is {in_channels}; "
            "call it from Python, with your own tensors"
        )
    color = CAFFE if style == "caffe" else TORCHVISION
    return color if in_channels == 3 else color.gray()


def preprocessing_of(net: nn.Module) -> Preprocessing:
    """Return the preprocessing of a backbone: its attribute ``preprocessing``, or the default for its style.

    Args:
        net: A backbone, or a model that contains one; for other models, torchvision's preprocessing is returned.

    Raises:
        ValueError: If ``net.preprocessing`` is None because that of the loaded weights is unknown, or if it is not set
            and the backbone has neither 1 nor 3 input channels.
    """
    backbone = next((module for module in net.modules() if hasattr(module, "preprocessing")), net)
    own: Preprocessing | None = getattr(backbone, "preprocessing", None)
    if own is None and "preprocessing" in vars(backbone):  # set by loading weights
        raise ValueError(
            "the preprocessing of the loaded weights is unknown, since they were trained on, or adapted to, channels "
            "other than color or gray; set `net.preprocessing = Preprocessing(mean=..., std=...)`, or call the "
            "backbone from Python, with your own tensors"
        )
    return own or preprocessing_for(
        in_channels=getattr(backbone, "in_channels", 3), style=getattr(backbone, "style", "pytorch")
    )
