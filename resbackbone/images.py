"""Pictures from files to what a backbone takes: finding, decoding, resizing."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from resbackbone.checks import check_choice, check_int

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MAX_PIXELS = 2**28  # of a resized picture: 3 GiB as float32

Size = int | tuple[int, int]


def find_images(paths: Iterable[str | Path], *, leave_out: str | Path | None = None) -> dict[Path, Path]:
    """Find pictures.

    Args:
        paths: Files, taken as they are, and folders, searched with all their subfolders for files with one of
            ``SUFFIXES``; hidden files and folders are passed over.
        leave_out: A folder inside one of them that is not searched, such as that of the results.

    Returns:
        For each picture its file and a name, a relative path that tells it from the others: the path inside the folder
        given, or the bare file name. If two were the same, all are relative to the folder that holds every picture.

    Raises:
        FileNotFoundError: If there is nothing at a path.
        ValueError: If a folder holds no picture.
    """
    names: dict[Path, Path] = {}
    seen: set[Path] = set()
    for path in map(Path, paths):
        found = _search(path, leave_out) if path.is_dir() else [path]
        if not path.exists():
            raise FileNotFoundError(f"no picture or folder at {str(path)!r}")
        if not found:
            raise ValueError(f"no pictures in {str(path)!r}; looked for {', '.join(SUFFIXES)}")
        for file in found:
            if file.absolute() not in seen:
                seen.add(file.absolute())
                names[file] = file.relative_to(path) if path.is_dir() else Path(file.name)
    if len(set(names.values())) < len(names):
        common = os.path.commonpath([file.parent for file in seen])
        names = {file: Path(os.path.relpath(file, common)) for file in names}
    return names


def _search(folder: Path, leave_out: str | Path | None) -> list[Path]:
    excluded = None if leave_out is None else Path(leave_out).resolve()
    if excluded and folder.resolve() not in excluded.parents:
        excluded = None
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and not (excluded and file.resolve().is_relative_to(excluded))
        and file.is_file()
    ]


class _Quiet:
    """Ignores Pillow's warnings about metadata, which no pixel depends on, while any thread is inside.

    ``warnings.catch_warnings`` alone changes and restores the filters of all threads, in whatever order they come.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._filters.__exit__(None, None, None)


_quiet = _Quiet()


def read_image(path: str | Path, *, channels: int = 3) -> Image.Image:
    """Decode a JPEG, PNG, WebP, BMP, TIFF or GIF, of an animation the first frame, upright as its EXIF data says.

    Args:
        path: The file.
        channels: 3 for colour, 1 for grayscale, whatever the file has. Transparency is dropped.

    Returns:
        A picture of mode "RGB" or "L", 8 bits per channel.

    Raises:
        ValueError: If the file cannot be read for whatever reason, which is given: missing, empty, no picture, cut
            off, damaged, more pixels than Pillow deems safe, 32 bits per channel.
    """
    check_choice("channels", channels, (1, 3))
    try:
        with _quiet, Image.open(path, formats=FORMATS) as image:
            image.load()
            picture = _eight_bits(_upright(image), png=image.format == "PNG").convert("RGB")
    except Exception as error:  # decoders raise what they stumble over: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"cannot read picture {str(path)!r}: {_reason(path, error)}") from error
    return picture.convert("L") if channels == 1 else picture


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data does not make the pixels unreadable
        return image


def _eight_bits(image: Image.Image, *, png: bool) -> Image.Image:
    """Scale 16-bit grayscale, which ``convert("RGB")`` clips, to 8 bits; leave the rest."""
    if image.mode.startswith("I;16") or (image.mode == "I" and png):  # how older Pillows open 16-bit PNGs
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"it has 32 bits per channel (mode {image.mode!r}) and no known range; save it with 8 or 16")
    return image


def _reason(path: str | Path, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "the file is empty" if Path(path).stat().st_size == 0 else f"it is no {', '.join(FORMATS)} file"
    strerror = getattr(error, "strerror", None)  # of an OSError from the system
    return str(strerror or error or type(error).__name__)


def parse_size(text: str) -> Size:
    """Read a size as the command line takes it.

    Args:
        text: Pixels: ``"640"``, the shorter side, or ``"480x640"``, height and width.

    Raises:
        ValueError: If it is neither.

    >>> parse_size("640"), parse_size("480x640")
    (640, (480, 640))
    """
    try:
        sides = tuple(int(side) for side in text.lower().split("x"))
    except ValueError:
        sides = ()
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise ValueError(f"a size is one side in pixels or HEIGHTxWIDTH, such as 640 or 480x640; got {text!r}")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def resize(picture: Image.Image, *, size: Size) -> Image.Image:
    """Resize a picture, bilinear and antialiased.

    Args:
        picture: Any 8-bit picture.
        size: The shorter side in pixels, keeping the aspect ratio, or (height, width).

    Returns:
        The picture; the very same where the size is right already.

    Raises:
        TypeError, ValueError: If a side is no positive integer, or the result would have more than ``MAX_PIXELS``.
    """
    if isinstance(size, int):
        check_int("size", size, low=1)
        shorter = min(picture.size)
        height, width = (round(side * size / shorter) for side in (picture.height, picture.width))
    else:
        height, width = size
    check_int("height", height, low=1)
    check_int("width", width, low=1)
    if height * width > MAX_PIXELS:
        raise ValueError(f"resized to {height}x{width} the picture would have more than {MAX_PIXELS:,} pixels")
    if (width, height) == picture.size:
        return picture
    return picture.resize((width, height), Image.Resampling.BILINEAR)
