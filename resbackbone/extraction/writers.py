"""The files written for one picture: feature maps, the overview, and the settings that they were made with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from resbackbone.extraction.extractor import Features
from resbackbone.utils.atomic_write import atomic_write, locked_folder

FileFormat = Literal["npy", "safetensors"]
OVERVIEW = "pyramid.png"
METADATA_KEY = "resbackbone"  # of the PNG text chunk


class FeatureWriter:
    """Writes the files of one picture into its folder.

    The overview is deleted first and written last, and holds the settings as metadata: where it is there, all other
    files are complete and were made with these settings.

    Args:
        settings: Everything but the picture that the features depend on.
        levels: Names of the feature maps.
        file_format: "npy", one file per level, or "safetensors", one file for all.
    """

    def __init__(self, settings: Mapping[str, Any], levels: Iterable[str], file_format: FileFormat) -> None:
        self.settings = {**settings, "format": file_format}
        self.savers: dict[str, Callable[[Features, Path], None]] = (
            {"features.safetensors": Features.save_safetensors}
            if file_format == "safetensors"
            else {f"{level}.npy": partial(Features.save_npy, level=level) for level in levels}
        )

    def metadata(self, picture: Path) -> str:
        """Return the settings with the size and modification time of a picture's file, as one line of JSON.

        Raises:
            OSError: If there is no such file.
        """
        status = picture.stat()
        source = {"bytes": status.st_size, "modified": status.st_mtime_ns}
        return json.dumps({**self.settings, "picture": source}, sort_keys=True, default=str)

    def is_complete(self, folder: Path, metadata: str) -> bool:
        """Return whether a folder holds all files, made with the same metadata."""
        try:
            with Image.open(folder / OVERVIEW, formats=["PNG"]) as overview:
                written = overview.info.get(METADATA_KEY)
        except (OSError, ValueError, SyntaxError):  # missing or damaged
            return False
        return written == metadata and all((folder / name).is_file() for name in self.savers)

    def write(self, folder: Path, features: Features, overview: Image.Image, metadata: str) -> None:
        """Write a picture's files.

        Raises:
            OSError: If a file cannot be written; then there is no overview.
        """
        folder.mkdir(parents=True, exist_ok=True)
        texts = PngInfo()
        texts.add_text(METADATA_KEY, metadata)
        with locked_folder(folder):  # against a second run that writes the same folder with other settings
            (folder / OVERVIEW).unlink(missing_ok=True)
            for name, save in self.savers.items():
                with atomic_write(folder / name) as path:
                    save(features, path)
            # Higher compression levels take several times as long as drawing, for a tenth of the bytes.
            with atomic_write(folder / OVERVIEW) as path:
                overview.save(path, format="PNG", compress_level=1, pnginfo=texts)
