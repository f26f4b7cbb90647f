"""Fixtures of the classification tests."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def photograph():
    """A picture in which no two regions are alike."""
    y, x = np.mgrid[:60, :80]
    return Image.fromarray(np.stack([x * 3, y * 4, (x * y) % 256], 2).astype(np.uint8))
