"""RandAugment: a few strong changes of geometry and color, drawn from a list."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from PIL import Image, ImageEnhance, ImageOps

from resbackbone.registry import TRANSFORMS
from resbackbone.training.classification.transforms import Interpolation, resampling
from resbackbone.utils.validation import check_int

_FILL = 124, 116, 104  # of what a shifted picture uncovers: ImageNet's mean
_STRONGEST = 10.0

_Pair = tuple[float, float]  # along x and y
Operation = Callable[[Image.Image, float, Image.Resampling], Image.Image]


@TRANSFORMS.register_module()
class RandAugment:
    """Applies operations that are drawn anew for every picture.

    Each operation comes with a strength from 0 to 10: most by their sign change direction at random, and the enhancing
    ones leave the picture as it is at 0.

    Args:
        operations: How many are drawn; the same one may come twice.
        magnitude: Mean strength.
        deviation: Standard deviation of the strength.
        probability: How often a drawn operation is carried out.
        interpolation: Pillow's filter where pixels move; "lanczos" is none for that.

    Source: Cubuk et al., RandAugment, CVPR 2020; operations, ranges and ``probability`` as in timm's "increasing" set,
    which the recipes of ResNet strikes back use.
    """

    def __init__(
        self,
        operations: int = 2,
        magnitude: float = 9.0,
        deviation: float = 0.5,
        probability: float = 0.5,
        interpolation: Interpolation = "bicubic",
    ) -> None:
        check_int("operations", operations, low=0)
        if not 0 <= magnitude <= _STRONGEST or deviation < 0 or not 0 <= probability <= 1:
            raise ValueError(
                "`magnitude` must be from 0 to 10, `deviation` not negative and `probability` from 0 to 1, got "
                f"{magnitude}, {deviation} and {probability}"
            )
        self.operations = operations
        self.magnitude = magnitude
        self.deviation = deviation
        self.probability = probability
        self.resample = resampling(interpolation)

    def __call__(self, picture: Image.Image, rng: Random) -> Image.Image:
        """Change a picture of mode "RGB" or "L"."""
        for operation in rng.choices(tuple(OPERATIONS.values()), k=self.operations):
            if rng.random() < self.probability:
                strength = min(max(rng.gauss(self.magnitude, self.deviation), 0.0), _STRONGEST) / _STRONGEST
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
