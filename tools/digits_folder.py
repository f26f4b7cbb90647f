"""Write scikit-learn's handwritten digits as a folder of pictures, one subfolder for each class.

1797 pictures of 8x8 pixels, of which every fifth of a class is held out:

    python tools/digits_folder.py data/digits      # data/digits/train/0/0000.png ... data/digits/val/9/1796.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

BRIGHTEST = 16  # in scikit-learn's arrays


def write_digits(folder: Path) -> None:
    """Write the pictures, named by their number in scikit-learn's list."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pictures = np.round(digits.images * (255 / BRIGHTEST)).astype(np.uint8)
    for digit in range(10):
        for place, number in enumerate(np.flatnonzero(digits.target == digit)):
            part = folder / ("val" if place % 5 == 4 else "train") / str(digit)
            part.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pictures[number]).save(part / f"{number:04}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write_digits(parser.parse_args().folder)
