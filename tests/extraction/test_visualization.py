"""The overview of a feature pyramid."""

import numpy as np
import pytest
from PIL import Image

from resbackbone.extraction.visualization import BACKGROUND, Level, apply_colormap, draw_pyramid


class TestPyramid:
    def levels(self, count, height, width):
        rng = np.random.default_rng(0)
        shapes = [(-(-height // 2**i), -(-width // 2**i)) for i in range(2, 2 + count)]
        return [Level(f"layer{i}", 64, 4, rng.random(shape, dtype=np.float32)) for i, shape in enumerate(shapes, 1)]

    @pytest.mark.parametrize("size", [(640, 480), (480, 640), (3000, 90), (90, 3000), (1, 1), (32, 32)])
    @pytest.mark.parametrize("count", [1, 4, 5])
    def test_every_shape_of_picture_fits(self, size, count):
        picture = Image.new("RGB", size, (0, 255, 0))
        drawn = np.asarray(draw_pyramid(picture, levels=self.levels(count, *size[::-1]), title="a title " * 40))
        height, width = drawn.shape[:2]
        assert 300 <= height <= 2000
        assert 300 <= width <= 2800
        assert (drawn == (0, 255, 0)).all(-1).sum() == pytest.approx(400 * 400, rel=0.01)
        frame = np.concatenate([drawn[:8].reshape(-1, 3), drawn[-8:].reshape(-1, 3), drawn[:, -8:].reshape(-1, 3)])
        assert (frame == BACKGROUND).all()  # nothing is cut off

    def test_feature_pixels_are_blocks_of_one_color(self):
        heat = np.array([[0, 1], [1, 0]], dtype=np.float32)
        drawn = np.asarray(draw_pyramid(Image.new("RGB", (64, 64)), levels=[Level("layer4", 8, 32, heat)], title=""))
        low, high = apply_colormap(np.array([0, 1], dtype=np.float32))
        for color in (low, high):
            assert (drawn == color).all(-1).sum() >= 2 * 200 * 200

    @pytest.mark.parametrize("value", [0.0, 3.0, np.nan, np.inf])
    def test_flat_and_broken_maps_are_drawn(self, value):
        level = Level("layer4", 8, 32, np.full((2, 2), value, dtype=np.float32))
        assert draw_pyramid(Image.new("L", (64, 64)), levels=[level], title="").mode == "RGB"

    def test_colors_grow_lighter_throughout(self):
        luminance = apply_colormap(np.linspace(0, 1, 200, dtype=np.float32)) @ (0.2126, 0.7152, 0.0722)
        assert (np.diff(luminance) > 0).all()
