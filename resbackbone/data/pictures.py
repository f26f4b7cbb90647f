"""Finding, decoding and resizing pictures."""

from __future__ import annotations

import importlib
import mimetypes
import os
import stat
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

from resbackbone.utils.validation import check_choice, check_int, check_ints, warn_user

# Formats that Pillow decodes without another program (EPS needs one); HEIF and JXL need plugins. Formats without a
# signature are tried only for their suffixes.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "HEIF", "JXL", "JPEG2000", "MPO", "PPM", "QOI")
FORMATS_BY_SUFFIX = ("TGA", "DIB", "PCX", "SGI")
MAX_PIXELS = 2**28  # per picture: 3 GiB as float32

_FEATURES = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}  # optional features of Pillow
# Suffixes of pictures that may be missing in the table of MIME types.
_PICTURES = {".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".j2k", ".psd", ".exr", ".hdr", ".eps", ".tga"}
_PICTURES |= {".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"}  # raw formats of cameras
_plugins = threading.Lock()

Size = int | tuple[int, int]
OnSkipped = Callable[[Path, str], None]


def readable_suffixes() -> dict[str, str]:
    """Return the suffixes of readable pictures, in lower case, with Pillow's names of the formats."""
    with _plugins:  # loading plugins is not thread-safe
        lacking = _load_plugins()
    usable = {name for name in (*FORMATS, *FORMATS_BY_SUFFIX) if name in Image.OPEN} - lacking
    return {suffix: name for suffix, name in Image.registered_extensions().items() if name in usable}


@lru_cache(maxsize=1)
def _load_plugins() -> frozenset[str]:
    """Load Pillow's plugins, and pillow-heif if it is installed; return the formats that this Pillow build lacks."""
    Image.init()
    if "HEIF" not in Image.OPEN:
        with suppress(ImportError):
            importlib.import_module("pillow_heif").register_heif_opener()
    known = {*features.modules, *features.codecs}  # Pillow warns about unknown names
    return frozenset(name for name, feature in _FEATURES.items() if feature not in known or not features.check(feature))


def find_pictures(
    paths: Iterable[str | Path], *, exclude: str | Path | None = None, on_skipped: OnSkipped | None = None
) -> dict[Path, Path]:
    """Find pictures in folders.

    Args:
        paths: Files, accepted with any suffix, and folders, searched recursively for files with one of
            :func:`readable_suffixes`; hidden files and folders are skipped. Symbolic links are followed, and no folder
            is searched twice.
        exclude: A subfolder that is not searched, such as the output folder.
        on_skipped: Called with the path and the reason for each broken link, and each picture with a suffix that Pillow
            cannot read; None to warn about them.

    Returns:
        The file and a unique name of each picture. The name is the path relative to the folder in ``paths``, or the
        file name; if these are not unique, the path relative to the common parent folder.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If a folder has no pictures.
    """
    names: dict[Path, Path] = {}
    seen: set[str] = set()
    skipped: dict[Path, str] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"no picture or folder at {str(path)!r}")
        found = _search(path, exclude, skipped) if path.is_dir() else [path]
        folders = {folder: os.path.realpath(folder) for folder in {file.parent for file in found}}
        for file in found:
            key = os.path.join(folders[file.parent], file.name)  # noqa: PTH118 - faster for many files
            if key not in seen:
                seen.add(key)
                names[file] = file.relative_to(path) if path.is_dir() else Path(file.name)
    if on_skipped:
        for file, reason in skipped.items():
            on_skipped(file, reason)
    else:
        for line in describe_skipped(skipped):
            warn_user(line)
    if len(set(names.values())) < len(names):
        common = os.path.commonpath([file.absolute().parent for file in names])
        names = {file: Path(os.path.relpath(file, common)) for file in names}
    return names


def describe_skipped(skipped: Mapping[Path, str]) -> list[str]:
    """Return one line per reason for skipped files: their number and the first five.

    >>> describe_skipped({Path("a.png"): "a broken link", Path("b.png"): "a broken link"})
    ["2 skipped, a broken link: 'a.png', 'b.png'"]
    """
    lines = []
    for reason in dict.fromkeys(skipped.values()):
        files = [repr(str(path)) for path, why in skipped.items() if why == reason]
        more = f" and {len(files) - 5} more" if len(files) > 5 else ""
        lines.append(f"{len(files)} skipped, {reason}: {', '.join(files[:5])}{more}")
    return lines


def _search(root: Path, exclude: str | Path | None, skipped: dict[Path, str]) -> list[Path]:
    """Return the pictures in a folder, and add unreadable pictures and broken links to ``skipped``."""
    readable = readable_suffixes()
    found, missed, others = [], {}, set()
    for file, problem in _walk(root, exclude):
        suffix = file.suffix.lower()
        if problem:
            missed[file] = problem
        elif suffix in readable:
            found.append(file)
        elif problem := _why_unreadable(suffix):
            missed[file] = f"as {problem}"
        else:
            others.add(suffix or "none")
    if not found:
        suffixes = sorted(readable, key=lambda suffix: (suffix != ".jpg", suffix))
        reasons = [*describe_skipped(missed), f"other suffixes there: {', '.join(sorted(others))}" if others else ""]
        there = "".join(f"; {reason}" for reason in reasons if reason)
        raise ValueError(f"no pictures in {str(root)!r}; looked for {', '.join(suffixes)}{there}")
    skipped.update(missed)
    return sorted(found)


def _why_unreadable(suffix: str) -> str:
    """Return why pictures with a suffix, in lower case, cannot be read; empty for readable ones and other files."""
    is_picture = suffix in _PICTURES or str(mimetypes.guess_type(f"a{suffix}")[0]).startswith("image/")
    if not is_picture or suffix in readable_suffixes():
        return ""
    hint = " (pip install pillow-heif)" if suffix in (".heic", ".heif", ".hif") else ""
    return f"Pillow cannot read {suffix} here{hint}"


def _walk(root: Path, exclude: str | Path | None) -> Iterator[tuple[Path, str]]:
    """Yield the files in a folder, recursively, each with a problem or an empty string.

    Every folder is searched once, preferably by its own path instead of a link. Parents of the root are not searched,
    since links to them are cycles.
    """
    done = {_identity(folder) for folder in root.resolve().parents}
    if exclude is not None and Path(exclude).is_dir() and _identity(exclude) != _identity(root):
        done.add(_identity(exclude))
    own, linked = deque([root]), deque[Path]()
    while own or linked:
        folder = own.popleft() if own else linked.popleft()
        if _identity(folder) in done:
            continue
        done.add(_identity(folder))
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            yield folder, f"not searched, {error.strerror}"
            continue
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_symlink() and not os.path.exists(path):  # noqa: PTH110 - never raises
                yield path, "a broken link"
            elif entry.is_dir():
                (linked if entry.is_symlink() else own).append(path)
            elif entry.is_file():
                yield path, ""


def _identity(folder: str | Path) -> tuple[int, int]:
    facts = Path(folder).stat()
    return facts.st_dev, facts.st_ino


class _Quiet:
    """Context manager, safe for threads, that ignores Pillow's warnings about metadata.

    ``warnings.catch_warnings`` alone is not: it changes and restores the filters of all threads in any order.
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


def read_picture(path: str | Path, *, channels: int = 3) -> Image.Image:
    """Decode a picture in one of ``FORMATS``: the first frame of animations, rotated by its EXIF orientation.

    Args:
        path: The file.
        channels: 3 converts to color, 1 to grayscale. Transparency is dropped.

    Returns:
        A picture of mode "RGB" or "L", 8 bits per channel.

    Raises:
        ValueError: If the file cannot be read, with the reason: missing, empty, not a picture, truncated, corrupt, more
            pixels than Pillow allows, 32 bits per channel.
    """
    check_choice("channels", channels, (1, 3))
    by_suffix = readable_suffixes().get(Path(path).suffix.lower())
    formats = (*FORMATS, by_suffix) if by_suffix in FORMATS_BY_SUFFIX else FORMATS
    try:
        if not stat.S_ISREG(mode := Path(path).stat().st_mode) and not stat.S_ISDIR(mode):
            raise ValueError("it is no regular file")  # reading could block forever
        with _quiet, Image.open(path, formats=[name for name in formats if name in Image.OPEN]) as image:
            if image.width * image.height > MAX_PIXELS:  # in case Pillow's own limit is disabled
                raise ValueError(f"it has {image.width}x{image.height} pixels, more than {MAX_PIXELS:,}")
            image.load()
            picture = _eight_bits(_upright(image), sixteen=image.format in ("PNG", "PPM")).convert("RGB")
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
        raise ValueError(f"cannot read picture {str(path)!r}: {_reason(path, error)}") from error
    return picture.convert("L") if channels == 1 else picture


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # pixels are readable without EXIF data
        return image


def _eight_bits(image: Image.Image, *, sixteen: bool) -> Image.Image:
    """Scale 16-bit grayscale, which ``convert("RGB")`` clips, to 8 bits.

    Args:
        image: Any picture.
        sixteen: Whether mode "I" means 16 bits, as in PGM files and, with older Pillow releases, in PNG.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and sixteen):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"it has 32 bits per channel (mode {image.mode!r}) and no known range; save it with 8 or 16")
    return image


def _reason(path: str | Path, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        if Path(path).stat().st_size == 0:
            return "the file is empty"
        return _why_unreadable(Path(path).suffix.lower()) or f"it is no {', '.join(FORMATS)} file"
    strerror = getattr(error, "strerror", None)  # of an OSError from the system
    return str(strerror or error or type(error).__name__)


def parse_size(text: str) -> Size:
    """Parse a size given on the command line.

    Args:
        text: ``"640"``, the shorter side in pixels, or ``"480x640"``, height and width.

    Raises:
        ValueError: If the text has another form.

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


def check_size(size: Size) -> None:
    """Raise TypeError or ValueError unless a size is a positive integer or a pair (height, width) of them."""
    if isinstance(size, (list, tuple)):
        check_ints("size", size, low=1, length=2, why="height, width")
    else:
        check_int("size", size, low=1)


def resize(picture: Image.Image, *, size: Size) -> Image.Image:
    """Resize a picture with antialiased bilinear interpolation.

    Args:
        picture: Any 8-bit picture.
        size: The shorter side in pixels, keeping the aspect ratio, or (height, width).

    Returns:
        The resized picture, or the same object if it already has that size.

    Raises:
        TypeError, ValueError: As :func:`check_size` does, or if the result would have more than ``MAX_PIXELS``.
    """
    check_size(size)
    if isinstance(size, int):
        shorter = min(picture.size)
        height, width = (round(side * size / shorter) for side in (picture.height, picture.width))
    else:
        height, width = size
    if height * width > MAX_PIXELS:
        raise ValueError(f"resized to {height}x{width} the picture would have more than {MAX_PIXELS:,} pixels")
    if (width, height) == picture.size:
        return picture
    return picture.resize((width, height), Image.Resampling.BILINEAR)
