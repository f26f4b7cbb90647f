"""RandAugment: random geometric and color operations of random strength."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from PIL import Image, ImageEnhance, ImageOps

from resbackbone.registry import TRANSFORMS
from resbackbone.training.classification.transforms import Interpolation, resampling_filter
from resbackbone.utils.validation import check_int

_FILL = 124, 116, 104  # color of uncovered pixels: the mean of ImageNet
_MAX_MAGNITUDE = 10.0

_Pair = tuple[float, float]  # x, y
Operation = Callable[[Image.Image, float, Image.Resampling], Image.Image]


@TRANSFORMS.register_module()
class RandAugment:
    """Applies random operations to each picture.

    The strength of each is drawn from a normal distribution and clipped to 0-10. Geometric operations and enhancements
    have a random sign; enhancements with strength 0 leave the picture unchanged.

    Args:
        num_ops: Number of operations, drawn with replacement.
        magnitude: Mean strength, 0-10.
        magnitude_std: Standard deviation of the strength.
        probability: Probability of applying each drawn operation.
        interpolation: Pillow's filter for geometric operations; "lanczos" is not supported by Pillow there.

    Source: Cubuk et al., RandAugment, CVPR 2020; operations, ranges and ``probability`` as in timm's "increasing" set,
    which the recipes of ResNet strikes back use.
    """

    def __init__(
        self,
        num_ops: int = 2,
        magnitude: float = 9.0,
        magnitude_std: float = 0.5,
        probability: float = 0.5,
        interpolation: Interpolation = "bicubic",
    ) -> None:
        check_int("num_ops", num_ops, low=0)
        if not 0 <= magnitude <= _MAX_MAGNITUDE or magnitude_std < 0 or not 0 <= probability <= 1:
            raise ValueError(
                "`magnitude` must be from 0 to 10, `magnitude_std` not negative and `probability` from 0 to 1, got "
                f"{magnitude}, {magnitude_std} and {probability}"
            )
        self.num_ops = num_ops
        self.magnitude = magnitude
        self.magnitude_std = magnitude_std
        self.probability = probability
        self.resample = resampling_filter(interpolation)

    def __call__(self, picture: Image.Image, rng: Random) -> Image.Image:
        """Augment a picture of mode "RGB" or "L"."""
        for operation in rng.choices(tuple(OPERATIONS.values()), k=self.num_ops):
            if rng.random() < self.probability:
                strength = min(max(rng.gauss(self.magnitude, self.magnitude_std), 0.0), _MAX_MAGNITUDE) / _MAX_MAGNITUDE
                picture = operation(picture, rng.choice((-1, 1)) * strength, self.resample)
        return picture


def _affine(
    picture: Image.Image, resample: Image.Resampling, *, shear: _Pair = (0, 0), shift: _Pair = (0, 0)
) -> Image.Image:
    matrix = (1, shear[0], shift[0] * picture.width, shear[1], 1, shift[1] * picture.height)
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, resample, fillcolor=_fill(picture))


def _fill(picture: Image.Image) -> tuple[int, ...] | int:
    return _FILL if picture.mode == "RGB" else _FILL[1]


def _rotate(picture: Image.Image, strength: float, resample: Image.Resampling) -> Image.Image:
    return picture.rotate(30 * strength, resample, fillcolor=_fill(picture))


def _enhance(kind: Callable[[Image.Image], Any]) -> Operation:
    return lambda picture, strength, _: kind(picture).enhance(1 + 0.9 * strength)


def _posterize(picture: Image.Image, strength: float, _: Image.Resampling) -> Image.Image:
    return ImageOps.posterize(picture, max(4 - int(4 * abs(strength)), 1))


def _solarize(picture: Image.Image, strength: float, _: Image.Resampling) -> Image.Image:
    return ImageOps.solarize(picture, 256 - int(256 * abs(strength)))


def _add_to_dark(picture: Image.Image, strength: float, _: Image.Resampling) -> Image.Image:
    more = int(110 * abs(strength))
    table = [min(value + more, 255) if value < 128 else value for value in range(256)]
    return picture.point(table * len(picture.getbands()))


OPERATIONS: dict[str, Operation] = {
    "autocontrast": lambda picture, *_: ImageOps.autocontrast(picture),
    "equalize": lambda picture, *_: ImageOps.equalize(picture),
    "invert": lambda picture, *_: ImageOps.invert(picture),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "add to dark": _add_to_dark,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear x": lambda picture, strength, resample: _affine(picture, resample, shear=(0.3 * strength, 0)),
    "shear y": lambda picture, strength, resample: _affine(picture, resample, shear=(0, 0.3 * strength)),
    "shift x": lambda picture, strength, resample: _affine(picture, resample, shift=(0.45 * strength, 0)),
    "shift y": lambda picture, strength, resample: _affine(picture, resample, shift=(0, 0.45 * strength)),
}
