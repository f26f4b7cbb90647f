"""The files that ``resbackbone extract`` writes for a picture, and the record that says what they were made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from resbackbone.cli.features import Features
from resbackbone.utils.atomic_write import atomic_write, locked_folder

OVERVIEW = "pyramid.png"
KEY = "resbackbone"  # of the record among the overview's texts


class ResultFiles:
    """How results lie in a picture's folder.

    The overview is removed first and written last, and carries the record: so it is there only when all the others
    are, and made of what it says.

    Args:
        settings: What the results depend on beside the picture.
        levels: Names of the feature maps.
        file_format: "npy", one file per level, or "safetensors", one for all.
    """

    def __init__(self, settings: Mapping[str, Any], levels: Iterable[str], file_format: str) -> None:
        self.settings = {**settings, "format": file_format}
        self.writers: dict[str, Callable[[Features, Path], None]] = (
            {"features.safetensors": Features.save_safetensors}
            if file_format == "safetensors"
            else {f"{level}.npy": partial(Features.save_npy, level=level) for level in levels}
        )

    def record(self, picture: Path) -> str:
        """Describe the settings and the picture's file in one line.

        Raises:
            OSError: If there is no such file.
        """
        facts = picture.stat()
        source = {"bytes": facts.st_size, "modified": facts.st_mtime_ns}
        return json.dumps({**self.settings, "picture": source}, sort_keys=True, default=str)

    def are_complete(self, folder: Path, record: str) -> bool:
        """Whether a folder holds all files, made of what the record says."""
        try:
            with Image.open(folder / OVERVIEW, formats=["PNG"]) as overview:
                recorded = overview.info.get(KEY)
        except (OSError, ValueError, SyntaxError):  # none, or none of ours
            return False
        return recorded == record and all((folder / name).is_file() for name in self.writers)

    def write(self, folder: Path, features: Features, overview: Image.Image, record: str) -> None:
        """Write a picture's files.

        Raises:
            OSError: If that fails; the overview is not there then.
        """
        folder.mkdir(parents=True, exist_ok=True)
        texts = PngInfo()
        texts.add_text(KEY, record)
        with locked_folder(folder):  # two runs with different settings would leave a mixture of both
            (folder / OVERVIEW).unlink(missing_ok=True)
            for name, write in self.writers.items():
                with atomic_write(folder / name) as path:
                    write(features, path)
            # Stronger compression takes several times as long as drawing, for a tenth of the bytes.
            with atomic_write(folder / OVERVIEW) as path:
                overview.save(path, format="PNG", compress_level=1, pnginfo=texts)
