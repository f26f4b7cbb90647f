"""The overview of a feature pyramid as one picture: the input and a heat map of every level, side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

PANEL_AREA = 400 * 400  # pixels of each panel, whatever its shape
MIN_CELL = 300  # pixels; a label fits in
MAX_ASPECT = 6.0  # panels of longer pictures are squeezed
WANTED_ASPECT = 1.5  # of the overview
MARGIN, GAP, LABEL, SCALE = 28, 24, 30, 26  # pixels: around all, between cells, text above a panel, scale below

BACKGROUND, BRIGHT, DIM = (22, 24, 31), (236, 238, 244), (150, 156, 170)
# From low to high, each lighter than the one before, so that order survives in grey.
ANCHORS = ((13, 15, 40), (58, 28, 110), (134, 40, 122), (205, 70, 88), (240, 132, 52), (250, 200, 86), (255, 250, 205))


@dataclass(frozen=True)
class Level:
    """One level of a pyramid, as it is drawn.

    Attributes:
        name: Its name, such as "layer2".
        channels: How many channels it has.
        stride: Input pixels per feature pixel.
        heat: Mean absolute activation over the channels, ``(H, W)``.
    """

    name: str
    channels: int
    stride: int
    heat: NDArray[np.float32]


def draw_pyramid(picture: Image.Image, *, levels: Sequence[Level], title: str) -> Image.Image:
    """Draw the input picture and its feature maps, each with a scale of its own.

    Args:
        picture: What the backbone was given, of mode "RGB" or "L".
        levels: The feature maps, finest first.
        title: A line above everything.

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


def heat_colours(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Map numbers in 0-1, ``(...)``, to colors, ``(..., 3)``, dark to light."""
    stops = np.linspace(0, 1, len(ANCHORS))
    channels = [np.interp(values, stops, [anchor[channel] for anchor in ANCHORS]) for channel in range(3)]
    colours: NDArray[np.uint8] = np.stack(channels, axis=-1).round().astype(np.uint8)
    return colours


def _panel_size(picture: Image.Image) -> tuple[int, int]:
    """Width and height of every panel."""
    aspect = min(max(picture.width / picture.height, 1 / MAX_ASPECT), MAX_ASPECT)
    return round(math.sqrt(PANEL_AREA * aspect)), round(math.sqrt(PANEL_AREA / aspect))


def _best_columns(count: int, cell: tuple[int, int]) -> int:
    """How many columns bring the overview nearest to the aspect wanted, empty cells counting against."""

    def badness(columns: int) -> float:
        rows = math.ceil(count / columns)
        aspect = columns * (cell[0] + GAP) / (rows * (cell[1] + GAP))
        return abs(math.log(aspect / WANTED_ASPECT)) + 0.15 * (rows * columns - count)

    return min(range(1, count + 1), key=badness)


def _draw_title(draw: ImageDraw.ImageDraw, title: str, width: int) -> None:
    # Names of files may hold what no font can draw: line breaks, control characters, bytes that are no UTF-8.
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
    canvas.paste(_scale(Image.fromarray(heat_colours(heat)), panel), (corner[0], corner[1] + LABEL))

    small = ImageFont.load_default(14)
    texts = (f"{low:.3g}", f"{high:.3g}")
    left, right = (draw.textlength(text, small) + 8 for text in texts)
    middle = corner[1] + LABEL + panel[1] + SCALE // 2 + 3
    bar = max(round(max(panel[0], MIN_CELL) - left - right), 1)
    ramp = heat_colours(np.linspace(0, 1, bar, dtype=np.float32))[None].repeat(8, 0)
    canvas.paste(Image.fromarray(ramp), (corner[0] + round(left), middle - 4))
    draw.text((corner[0], middle), texts[0], DIM, small, anchor="lm")
    draw.text((corner[0] + left + bar + 8, middle), texts[1], DIM, small, anchor="lm")


def _scale(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Fill a panel: enlarged so that single pixels stay visible, shrunk so that none is left out."""
    width = image.resize((size[0], image.height), _filter(size[0] > image.width))
    return width.resize(size, _filter(size[1] > image.height))


def _filter(enlarge: bool) -> Image.Resampling:
    return Image.Resampling.NEAREST if enlarge else Image.Resampling.BOX
