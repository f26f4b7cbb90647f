"""Visualization of a feature pyramid: the input picture and a heat map of each level, side by side in one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

PANEL_AREA = 400 * 400  # in pixels, at any aspect ratio
MIN_CELL = 300  # minimum width in pixels, so that labels fit
MAX_ASPECT = 6.0  # panels of longer pictures are squeezed
TARGET_ASPECT = 1.5  # of the overview
MARGIN, GAP, LABEL, SCALE = 28, 24, 30, 26  # pixels: outer margin, between cells, text above a panel, color bar below

BACKGROUND, BRIGHT, DIM = (22, 24, 31), (236, 238, 244), (150, 156, 170)
# Colormap from low to high; lightness increases, so that the order survives in grayscale.
ANCHORS = ((13, 15, 40), (58, 28, 110), (134, 40, 122), (205, 70, 88), (240, 132, 52), (250, 200, 86), (255, 250, 205))


@dataclass(frozen=True)
class Level:
    """Heat map of one pyramid level.

    Attributes:
        name: Such as "layer2".
        channels: Number of channels.
        stride: In input pixels.
        heat: Mean absolute activation over the channels, ``(H, W)``.
    """

    name: str
    channels: int
    stride: int
    heat: NDArray[np.float32]


def draw_pyramid(picture: Image.Image, *, levels: Sequence[Level], title: str) -> Image.Image:
    """Draw the input picture and its heat maps, each normalized on its own.

    Args:
        picture: The input, of mode "RGB" or "L".
        levels: The heat maps, finest first.
        title: Line at the top.

    Returns:
        An RGB picture, about 1300 to 2000 pixels wide unless the input is very long.
    """
    panel = _panel_size(picture)
    cell = (max(panel[0], MIN_CELL), LABEL + panel[1] + SCALE)
    columns = _best_columns(len(levels) + 1, cell)
    rows = math.ceil((len(levels) + 1) / columns)
    top = MARGIN + LABEL + GAP // 2
    width = 2 * MARGIN + columns * (cell[0] + GAP) - GAP
    canvas = Image.new("RGB", (width, top + rows * (cell[1] + GAP) - GAP + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    _draw_title(draw, title, width)
    for index in range(len(levels) + 1):
        row, column = divmod(index, columns)
        left, upper = MARGIN + column * (cell[0] + GAP), top + row * (cell[1] + GAP)
        if index == 0:
            _draw_label(draw, (left, upper), "input", f"{picture.height}x{picture.width}")
            canvas.paste(_scale(picture.convert("RGB"), panel), (left, upper + LABEL))
        else:
            _draw_level(canvas, (left, upper), levels[index - 1], panel)
    return canvas


def apply_colormap(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Map values in 0-1, ``(...)``, to RGB colors, ``(..., 3)``."""
    stops = np.linspace(0, 1, len(ANCHORS))
    channels = [np.interp(values, stops, [anchor[channel] for anchor in ANCHORS]) for channel in range(3)]
    colors: NDArray[np.uint8] = np.stack(channels, axis=-1).round().astype(np.uint8)
    return colors


def _panel_size(picture: Image.Image) -> tuple[int, int]:
    """Return width and height of each panel in pixels."""
    aspect = min(max(picture.width / picture.height, 1 / MAX_ASPECT), MAX_ASPECT)
    return round(math.sqrt(PANEL_AREA * aspect)), round(math.sqrt(PANEL_AREA / aspect))


def _best_columns(count: int, cell: tuple[int, int]) -> int:
    """Return the number of columns that brings the overview closest to ``TARGET_ASPECT``; empty cells are penalized."""

    def cost(columns: int) -> float:
        rows = math.ceil(count / columns)
        aspect = columns * (cell[0] + GAP) / (rows * (cell[1] + GAP))
        return abs(math.log(aspect / TARGET_ASPECT)) + 0.15 * (rows * columns - count)

    return min(range(1, count + 1), key=cost)


def _draw_title(draw: ImageDraw.ImageDraw, title: str, width: int) -> None:
    # File names may contain characters that no font has: line breaks, control characters, bytes that are not UTF-8.
    title = "".join(letter if letter.isprintable() else "�" for letter in title)
    font, small = ImageFont.load_default(22), ImageFont.load_default(16)
    note = "mean |activation| over channels"
    free = width - 2 * MARGIN - (draw.textlength(note, small) + GAP)
    while draw.textlength(title, font) > free and len(title) > 1:
        title = title[:-2] + "…"
    draw.text((MARGIN, MARGIN + 16), title, BRIGHT, font, anchor="ls")
    draw.text((width - MARGIN, MARGIN + 16), note, DIM, small, anchor="rs")


def _draw_label(draw: ImageDraw.ImageDraw, corner: tuple[int, int], name: str, facts: str) -> None:
    font, small = ImageFont.load_default(18), ImageFont.load_default(16)
    baseline = corner[1] + LABEL - 10
    draw.text((corner[0], baseline), name, BRIGHT, font, anchor="ls")
    draw.text((corner[0] + draw.textlength(name, font) + 10, baseline), facts, DIM, small, anchor="ls")


def _draw_level(canvas: Image.Image, corner: tuple[int, int], level: Level, panel: tuple[int, int]) -> None:
    draw = ImageDraw.Draw(canvas)
    height, width = level.heat.shape
    _draw_label(draw, corner, level.name, f"{level.channels} ch   {height}x{width}   stride {level.stride}")
    values = np.nan_to_num(level.heat.astype(np.float64))
    low, high = np.percentile(values, (1, 99))
    heat = ((values - low) / (high - low or 1)).clip(0, 1)
    canvas.paste(_scale(Image.fromarray(apply_colormap(heat)), panel), (corner[0], corner[1] + LABEL))

    small = ImageFont.load_default(14)
    texts = (f"{low:.3g}", f"{high:.3g}")
    left, right = (draw.textlength(text, small) + 8 for text in texts)
    middle = corner[1] + LABEL + panel[1] + SCALE // 2 + 3
    bar = max(round(max(panel[0], MIN_CELL) - left - right), 1)
    ramp = apply_colormap(np.linspace(0, 1, bar, dtype=np.float32))[None].repeat(8, 0)
    canvas.paste(Image.fromarray(ramp), (corner[0] + round(left), middle - 4))
    draw.text((corner[0], middle), texts[0], DIM, small, anchor="lm")
    draw.text((corner[0] + left + bar + 8, middle), texts[1], DIM, small, anchor="lm")


def _scale(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize to a panel: nearest neighbor to enlarge, so that feature pixels stay visible; box filter to shrink."""
    width = image.resize((size[0], image.height), _filter(size[0] > image.width))
    return width.resize(size, _filter(size[1] > image.height))


def _filter(enlarge: bool) -> Image.Resampling:
    return Image.Resampling.NEAREST if enlarge else Image.Resampling.BOX
