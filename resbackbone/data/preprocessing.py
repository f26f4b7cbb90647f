"""What weights expect of a picture: order of the channels, mean and deviation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from resbackbone.utils.validation import check_choice, check_int, check_number, check_sequence

if TYPE_CHECKING:  # backbones know what they expect of pictures, and need no library for them
    from PIL import Image
    from torch import nn


MOST = 2**16 - 1  # of a picture with two bytes a channel


@dataclass(frozen=True)
class Preprocessing:
    """What a backbone's weights expect of a picture.

    Attributes:
        mean: Subtracted from each channel, 0-255, in the order of ``order``; one number for grayscale.
        std: What each channel is then divided by, 0-255.
        order: Order of the channels.
        size: Side in pixels of the square crops that the published accuracy is for; None where nobody says.
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
        """Return what one channel in place of three alike ones means: mean and deviation, averaged over them."""
        mean, std = (sum(numbers) / len(numbers) for numbers in (self.mean, self.std))
        return Preprocessing(mean=(mean,), std=(std,), size=self.size)

    def __call__(self, picture: Image.Image) -> Tensor:
        """Normalize a picture.

        Args:
            picture: Of mode "RGB", or "L" where ``mean`` has one entry, as :func:`resbackbone.data.pictures.read_image`
                returns it.

        Returns:
            ``(1, C, H, W)``, float32.

        Raises:
            ValueError: If the mode is another one.
        """
        check_choice("picture.mode", picture.mode, ("L",) if len(self.mean) == 1 else ("RGB",))
        pixels = torch.from_numpy(np.array(picture)).reshape(picture.height, picture.width, -1)
        if self.order == "BGR":
            pixels = pixels.flip(2)
        return ((pixels - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(2, 0, 1).contiguous()[None]


TORCHVISION = Preprocessing()
CAFFE = Preprocessing(mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0), order="BGR")  # as detectron2 has it
DETECTRON = Preprocessing(mean=(102.9801, 115.9465, 122.7717), std=(1.0, 1.0, 1.0), order="BGR")  # and its forerunner

INCEPTION = Preprocessing(mean=(127.5,) * 3, std=(127.5,) * 3)  # from -1 to 1, which BiT expects

UNIT_RANGE = Preprocessing(mean=(0.0,) * 3, std=(255.0,) * 3)  # from 0 to 1, as whole RT-DETRs take it


def preprocessing_for(*, in_channels: int, style: str) -> Preprocessing:
    """Return the usual preprocessing: for one channel the colors' numbers, averaged.

    Args:
        in_channels: Channels that the backbone takes.
        style: The backbone's ``style``: "caffe" for weights converted from Caffe, "pytorch" otherwise.

    Raises:
        ValueError: If there are not 1 or 3 channels.
    """
    if in_channels not in (1, 3):
        raise ValueError(
            f"pictures have 1 or 3 channels, the backbone's `in_channels` is {in_channels}; "
            "feed it from Python, with tensors of your own"
        )
    colour = CAFFE if style == "caffe" else TORCHVISION
    return colour if in_channels == 3 else colour.gray()


def preprocessing_of(net: nn.Module) -> Preprocessing:
    """Return what a backbone's weights expect of a picture: its own ``preprocessing``, or the usual one by its style.

    Args:
        net: A backbone, or what holds one. Of what holds none, the numbers of torchvision are expected.

    Raises:
        ValueError: If the backbone says nothing, and does not take 1 or 3 channels; or if weights were loaded of which
            nobody knows it, and ``net.preprocessing`` is None therefore.
    """
    backbone = next((module for module in net.modules() if hasattr(module, "preprocessing")), net)
    own: Preprocessing | None = getattr(backbone, "preprocessing", None)
    if own is None and "preprocessing" in vars(backbone):  # set when weights were loaded; until then the class has it
        raise ValueError(
            "nobody says what the loaded weights expect of a picture, as they were trained on, or adapted to, channels "
            "that are not those of a color or gray picture; set `net.preprocessing` to a `Preprocessing(mean=..., "
            "std=...)`, or feed the net from Python, with tensors of your own"
        )
    return own or preprocessing_for(
        in_channels=getattr(backbone, "in_channels", 3), style=getattr(backbone, "style", "pytorch")
    )
