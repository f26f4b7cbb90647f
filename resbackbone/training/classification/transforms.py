"""Transforms of Pillow pictures: resizing, cropping and flipping, with an explicit random generator."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from random import Random
from typing import Any, Literal, Protocol

from PIL import Image, ImageOps

from resbackbone.registry import TRANSFORMS
from resbackbone.utils.validation import check_choice, check_int, check_sequence

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
_RESAMPLING = {name: Image.Resampling[name.upper()] for name in ("nearest", "bilinear", "bicubic", "lanczos")}


class Transform(Protocol):
    """Interface of the entries of a dataset's ``transforms``."""

    def __call__(self, picture: Image.Image, rng: Random) -> Image.Image:
        """Return the transformed picture; random numbers come from ``rng`` only."""


def build_transforms(configs: Iterable[Mapping[str, Any] | Transform]) -> list[Transform]:
    """Build transforms from configs; callables are used as they are.

    Raises:
        TypeError: If ``configs`` is not a sequence of configs and callables.
    """
    if isinstance(configs, (str, Mapping)) or not isinstance(configs, Iterable):
        raise TypeError(f"`transforms` must be a list of configs or callables, got {configs!r}")
    configs = list(configs)
    for config in configs:
        if not isinstance(config, Mapping) and not callable(config):
            raise TypeError(f"`transforms` must be a list of configs or callables, got {config!r} in it")
    return [TRANSFORMS.build(dict(config)) if isinstance(config, Mapping) else config for config in configs]


def height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    """Return (height, width) in pixels from that or from the side of a square.

    Raises:
        TypeError, ValueError: If ``size`` is neither.
    """
    height, width = (size, size) if isinstance(size, int) else check_sequence("size", size, length=2)
    check_int("height", height, low=1)
    check_int("width", width, low=1)
    return height, width


def resampling_filter(interpolation: str) -> Image.Resampling:
    """Return Pillow's resampling filter of a name; all but "nearest" are antialiased.

    Raises:
        ValueError: If the name is unknown.
    """
    check_choice("interpolation", interpolation, tuple(_RESAMPLING))
    return _RESAMPLING[interpolation]


@TRANSFORMS.register_module()
class Resize:
    """Resizes pictures.

    Args:
        size: The shorter side in pixels, keeping the aspect ratio, or (height, width).
        interpolation: Pillow's filter.
    """

    def __init__(self, size: int | Sequence[int], interpolation: Interpolation = "bilinear") -> None:
        self.height, self.width = height_and_width(size)
        self.keep_ratio = isinstance(size, int)
        self.resample = resampling_filter(interpolation)

    def __call__(self, picture: Image.Image, rng: Random) -> Image.Image:
        """Resize a picture."""
        width, height = self.width, self.height
        if self.keep_ratio:
            shorter = min(picture.size)
            width, height = (max(round(side * self.height / shorter), 1) for side in picture.size)
        return picture.resize((width, height), self.resample)


@TRANSFORMS.register_module()
class CenterCrop:
    """Crops the center; pads smaller pictures with black.

    Args:
        size: Side in pixels, or (height, width).
    """

    def __init__(self, size: int | Sequence[int]) -> None:
        self.height, self.width = height_and_width(size)

    def __call__(self, picture: Image.Image, rng: Random) -> Image.Image:
        """Crop a picture."""
        spare = picture.width - self.width, picture.height - self.height
        # Rounded as in torchvision, to reproduce published accuracies.
        left, top = (round(pixels / 2) if pixels > 0 else int(pixels / 2) for pixels in spare)
        return _crop(picture, left, top, self)


@TRANSFORMS.register_module()
class RandomCrop:
    """Crops at a random position.

    Args:
        size: Side in pixels, or (height, width).
        padding: Black pixels added on every side first.
    """

    def __init__(self, size: int | Sequence[int], padding: int = 0) -> None:
        check_int("padding", padding, low=0)
        self.height, self.width = height_and_width(size)
        self.padding = padding

    def __call__(self, picture: Image.Image, rng: Random) -> Image.Image:
        """Crop a picture."""
        spare_x = picture.width + 2 * self.padding - self.width
        spare_y = picture.height + 2 * self.padding - self.height
        left, top = (rng.randint(min(spare, 0), max(spare, 0)) for spare in (spare_x, spare_y))
        return _crop(picture, left - self.padding, top - self.padding, self)


def _crop(picture: Image.Image, left: int, top: int, size: CenterCrop | RandomCrop) -> Image.Image:
    return picture.crop((left, top, left + size.width, top + size.height))


@TRANSFORMS.register_module()
class RandomResizedCrop:
    """Crops a random area and aspect ratio, and resizes the crop.

    Args:
        size: Side of the output in pixels, or (height, width).
        scale: Minimum and maximum area, as a fraction of the picture's.
        ratio: Minimum and maximum aspect ratio, width / height, sampled log-uniformly.
        interpolation: Pillow's filter.

    Source: Szegedy et al., Going Deeper with Convolutions, CVPR 2015, section 6.
    """

    attempts = 10  # to find a crop inside the picture; then the largest one at the center is used

    def __init__(
        self,
        size: int | Sequence[int],
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        interpolation: Interpolation = "bilinear",
    ) -> None:
        self.height, self.width = height_and_width(size)
        self.scale = _range("scale", scale, high=1.0)
        self.ratio = _range("ratio", ratio)
        self.resample = resampling_filter(interpolation)

    def __call__(self, picture: Image.Image, rng: Random) -> Image.Image:
        """Crop and resize a picture."""
        left, top, width, height = self._box(picture, rng)
        crop = picture.crop((left, top, left + width, top + height))
        return crop.resize((self.width, self.height), self.resample)

    def _box(self, picture: Image.Image, rng: Random) -> tuple[int, int, int, int]:
        low, high = (math.log(bound) for bound in self.ratio)
        for _ in range(self.attempts):
            area = picture.width * picture.height * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(low, high))
            width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < width <= picture.width and 0 < height <= picture.height:
                left, top = rng.randint(0, picture.width - width), rng.randint(0, picture.height - height)
                return left, top, width, height
        ratio = min(max(picture.width / picture.height, self.ratio[0]), self.ratio[1])
        width = max(min(picture.width, round(picture.height * ratio)), 1)
        height = max(min(picture.height, round(picture.width / ratio)), 1)
        return (picture.width - width) // 2, (picture.height - height) // 2, width, height


def _range(name: str, value: Sequence[float], high: float = math.inf) -> tuple[float, float]:
    low, most = check_sequence(name, value, length=2, why="the minimum and the maximum")
    if not 0 < low <= most <= high:
        raise ValueError(f"`{name}` must increase from above 0 to at most {high}, got {tuple(value)}")
    return low, most


@TRANSFORMS.register_module()
class RandomHorizontalFlip:
    """Flips pictures horizontally at random.

    Args:
        probability: Probability of flipping.
    """

    def __init__(self, probability: float = 0.5) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"`probability` must be from 0 to 1, got {probability}")
        self.probability = probability

    def __call__(self, picture: Image.Image, rng: Random) -> Image.Image:
        """Flip a picture at random."""
        return ImageOps.mirror(picture) if rng.random() < self.probability else picture
