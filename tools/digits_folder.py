"""Write scikit-learn's handwritten digits as a folder of pictures, one subfolder for each class.

1797 pictures of 8x8 pixels; every fifth of a class goes to the validation set:

    python tools/digits_folder.py data/digits      # data/digits/train/0/0000.png ... data/digits/val/9/1796.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

MAX_VALUE = 16  # of scikit-learn's pixels


def write_digits(folder: Path) -> None:
    """Write the pictures, named by their index in scikit-learn's dataset."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pictures = np.round(digits.images * (255 / MAX_VALUE)).astype(np.uint8)
    for digit in range(10):
        for count, index in enumerate(np.flatnonzero(digits.target == digit)):
            class_folder = folder / ("val" if count % 5 == 4 else "train") / str(digit)
            class_folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pictures[index]).save(class_folder / f"{index:04}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write_digits(parser.parse_args().folder)
