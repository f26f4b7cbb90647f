"""Transforms of pictures, and RandAugment."""

import math
import random

import numpy as np
import pytest
from PIL import Image

from resbackbone.training.classification import (
    CenterCrop,
    RandAugment,
    RandomCrop,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Resize,
)
from resbackbone.training.classification.rand_augment import OPERATIONS


def test_resize_and_center_crop_equal_torchvision(torchvision, photograph):
    transforms = torchvision.transforms
    for size in (40, (30, 50)):
        for name in ("bilinear", "bicubic"):
            reference = transforms.Resize(size, transforms.InterpolationMode(name))(photograph)
            assert np.array_equal(Resize(size, name)(photograph, random.Random()), reference), (size, name)
    for size in (40, (21, 50), 70, (70, 31)):
        reference = transforms.CenterCrop(size)(photograph)
        assert np.array_equal(CenterCrop(size)(photograph, random.Random()), reference), size


def test_random_resized_crop_distribution():
    size, rng = 1000, random.Random(0)
    crop = RandomResizedCrop(8, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    boxes = [crop._box(Image.new("L", (size, size)), rng) for _ in range(2000)]
    for left, top, width, height in boxes:
        assert 0 <= left <= size - width
        assert 0 <= top <= size - height
    inside = [(w * h / size**2, w / h) for _, _, w, h in boxes if w * h < 0.7 * size**2]  # never needs a second attempt
    areas, ratios = zip(*inside, strict=True)
    assert min(areas) > 0.079
    assert np.mean(areas) == pytest.approx((0.08 + 0.7) / 2, abs=0.02)
    assert np.mean(np.log(ratios)) == pytest.approx(0, abs=0.02)  # wide and high crops are equally likely
    assert np.std(np.log(ratios)) == pytest.approx(
        math.log(16 / 9) / math.sqrt(12), rel=0.05
    )  # of a uniform distribution
    assert 0.74 < min(ratios) < 0.76
    assert 1.32 < max(ratios) < 1.34


def test_random_resized_crop_falls_back_to_center():
    crop = RandomResizedCrop(8, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert crop._box(Image.new("L", (100, 40)), random.Random(0)) == (30, 0, 40, 40)
    assert crop(Image.new("L", (100, 40)), random.Random(0)).size == (8, 8)


def test_random_crop_positions():
    picture = Image.fromarray(np.arange(1, 10, dtype=np.uint8).reshape(3, 3))
    corners = {np.array(RandomCrop(3, padding=1)(picture, random.Random(seed)))[0, 0] for seed in range(100)}
    assert corners == {0, 1, 2, 4, 5}
    assert RandomCrop(5)(picture, random.Random(0)).size == (5, 5)


def test_random_horizontal_flip(photograph):
    mirrored = np.array(photograph)[:, ::-1]
    assert np.array_equal(RandomHorizontalFlip(1.0)(photograph, random.Random(0)), mirrored)
    assert RandomHorizontalFlip(0.0)(photograph, random.Random(0)) is photograph
    flipped = [RandomHorizontalFlip()(photograph, random.Random(seed)) is not photograph for seed in range(400)]
    assert 0.4 < np.mean(flipped) < 0.6


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_rand_augment_operations(name, mode, photograph):
    picture = photograph.convert(mode)
    for strength in (-1.0, 0.0, 0.3, 1.0):
        changed = OPERATIONS[name](picture, strength, Image.Resampling.BICUBIC)
        assert changed.size == picture.size
        assert changed.mode == mode
    gradual = {"rotate", "add to dark", "color", "contrast", "brightness", "sharpness", "solarize"}
    if name in gradual or name.startswith(("shear", "shift")):
        assert np.array_equal(OPERATIONS[name](picture, 0.0, Image.Resampling.BICUBIC), picture)
    if (name, mode) not in {("color", "L"), ("autocontrast", "L")}:
        assert not np.array_equal(OPERATIONS[name](picture, 1.0, Image.Resampling.BICUBIC), picture)


def test_rand_augment_distribution(photograph, monkeypatch):
    seen = []
    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, lambda picture, strength, _, name=name: seen.append(strength) or picture)
    augment = RandAugment(num_ops=2, magnitude=7, magnitude_std=0.5, probability=0.5)
    for seed in range(1000):
        augment(photograph, random.Random(seed))
    assert len(seen) == pytest.approx(1000, rel=0.1)  # 2 operations with probability 1/2
    assert np.mean(np.abs(seen)) == pytest.approx(0.7, abs=0.01)
    assert np.std(np.abs(seen)) == pytest.approx(0.05, rel=0.1)
    assert np.mean(np.sign(seen)) == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Resize(0), "`height` must be at least 1, got 0"),
        (lambda: Resize(5, "best"), "`interpolation` must be one of 'nearest', .*; got 'best'"),
        (lambda: RandomResizedCrop(5, scale=(0.5, 2)), "`scale` must increase from above 0 to at most 1.0, got"),
        (lambda: RandomHorizontalFlip(2), "`probability` must be from 0 to 1, got 2"),
        (lambda: RandAugment(magnitude=11), "`magnitude` must be from 0 to 10"),
    ],
)
def test_invalid_arguments(build, words):
    with pytest.raises(ValueError, match=words):
        build()
