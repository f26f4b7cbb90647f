"""Find, decode and resize the picture files that backbones are run on."""

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

# What Pillow decodes without another program, as EPS needs one; HEIF and JXL come with plugins.
# Formats without a signature are tried only if the suffix names them.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "HEIF", "JXL", "JPEG2000", "MPO", "PPM", "QOI")
FORMATS_BY_SUFFIX = ("TGA", "DIB", "PCX", "SGI")
MAX_PIXELS = 2**28  # of a picture: 3 GiB as float32

_FEATURES = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}  # that a Pillow may lack
# Pictures that the table of MIME types may not know.
_PICTURES = {".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".j2k", ".psd", ".exr", ".hdr", ".eps", ".tga"}
_PICTURES |= {".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"}  # cameras' own
_plugins = threading.Lock()

Size = int | tuple[int, int]
LeftOut = Callable[[Path, str], None]


def readable_suffixes() -> dict[str, str]:
    """Return the suffixes of pictures that can be read here, in lower case, each with Pillow's name of the format."""
    with _plugins:  # which threads cannot load at the same time
        lacking = _load_plugins()
    usable = {name for name in (*FORMATS, *FORMATS_BY_SUFFIX) if name in Image.OPEN} - lacking
    return {suffix: name for suffix, name in Image.registered_extensions().items() if name in usable}


@lru_cache(maxsize=1)
def _load_plugins() -> frozenset[str]:
    """Load Pillow's plugins, and the one for HEIF if it is installed; return the formats that were not compiled."""
    Image.init()
    if "HEIF" not in Image.OPEN:
        with suppress(ImportError):
            importlib.import_module("pillow_heif").register_heif_opener()
    known = {*features.modules, *features.codecs}  # of others Pillow warns
    return frozenset(name for name, feature in _FEATURES.items() if feature not in known or not features.check(feature))


def find_images(
    paths: Iterable[str | Path], *, leave_out: str | Path | None = None, on_left_out: LeftOut | None = None
) -> dict[Path, Path]:
    """Find pictures.

    Args:
        paths: Files, taken as they are, and folders, searched with all their subfolders for files with one of
            :func:`readable_suffixes`; hidden files and folders are passed over. Links to folders are followed, and no
            folder is searched twice.
        leave_out: A folder inside one of them that is not searched, such as that of the results.
        on_left_out: Called for each picture that Pillow cannot read here by its suffix, and each broken link, with the
            path and the reason; None to warn of them.

    Returns:
        For each picture its file and a name, a relative path that tells it from the others: the path inside the folder
        given, or the bare file name. If two were the same, all are relative to the folder that holds every picture.

    Raises:
        FileNotFoundError: If there is nothing at a path.
        ValueError: If a folder holds no picture.
    """
    names: dict[Path, Path] = {}
    seen: set[str] = set()
    left_out: dict[Path, str] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"no picture or folder at {str(path)!r}")
        found = _search(path, leave_out, left_out) if path.is_dir() else [path]
        folders = {folder: os.path.realpath(folder) for folder in {file.parent for file in found}}
        for file in found:
            key = os.path.join(folders[file.parent], file.name)  # noqa: PTH118 - of a million files
            if key not in seen:
                seen.add(key)
                names[file] = file.relative_to(path) if path.is_dir() else Path(file.name)
    if on_left_out:
        for file, reason in left_out.items():
            on_left_out(file, reason)
    else:
        for line in describe_left_out(left_out):
            warn_user(line)
    if len(set(names.values())) < len(names):
        common = os.path.commonpath([file.absolute().parent for file in names])
        names = {file: Path(os.path.relpath(file, common)) for file in names}
    return names


def describe_left_out(left_out: Mapping[Path, str]) -> list[str]:
    """Return a line for each reason why files were left out: how many, and the first five.

    >>> describe_left_out({Path("a.png"): "a broken link", Path("b.png"): "a broken link"})
    ["2 left out, a broken link: 'a.png', 'b.png'"]
    """
    lines = []
    for reason in dict.fromkeys(left_out.values()):
        files = [repr(str(path)) for path, why in left_out.items() if why == reason]
        more = f" and {len(files) - 5} more" if len(files) > 5 else ""
        lines.append(f"{len(files)} left out, {reason}: {', '.join(files[:5])}{more}")
    return lines


def _search(root: Path, leave_out: str | Path | None, left_out: dict[Path, str]) -> list[Path]:
    """Return the pictures below a folder, and note what else is there that was meant as one."""
    readable = readable_suffixes()
    found, missed, others = [], {}, set()
    for file, problem in _walk(root, leave_out):
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
        reasons = [*describe_left_out(missed), f"other suffixes there: {', '.join(sorted(others))}" if others else ""]
        there = "".join(f"; {reason}" for reason in reasons if reason)
        raise ValueError(f"no pictures in {str(root)!r}; looked for {', '.join(suffixes)}{there}")
    left_out.update(missed)
    return sorted(found)


def _why_unreadable(suffix: str) -> str:
    """Say why a picture of such a suffix, in lower case, cannot be read; nothing where it is none, or can be."""
    is_picture = suffix in _PICTURES or str(mimetypes.guess_type(f"a{suffix}")[0]).startswith("image/")
    if not is_picture or suffix in readable_suffixes():
        return ""
    hint = " (pip install pillow-heif)" if suffix in (".heic", ".heif", ".hif") else ""
    return f"Pillow cannot read {suffix} here{hint}"


def _walk(root: Path, leave_out: str | Path | None) -> Iterator[tuple[Path, str]]:
    """Yield the files below a folder, each with what is wrong with it, if anything is.

    Every folder is searched once, and rather by its own path than by a link to it. Those that hold the root are not:
    links to them are loops.
    """
    done = {_identity(folder) for folder in root.resolve().parents}
    if leave_out is not None and Path(leave_out).is_dir() and _identity(leave_out) != _identity(root):
        done.add(_identity(leave_out))
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
            if entry.is_symlink() and not os.path.exists(path):  # noqa: PTH110 - which raises nothing
                yield path, "a broken link"
            elif entry.is_dir():
                (linked if entry.is_symlink() else own).append(path)
            elif entry.is_file():
                yield path, ""


def _identity(folder: str | Path) -> tuple[int, int]:
    facts = Path(folder).stat()
    return facts.st_dev, facts.st_ino


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
    """Decode a picture of one of ``FORMATS``, of an animation the first frame, upright as its EXIF data says.

    Args:
        path: The file.
        channels: 3 for color, 1 for grayscale, whatever the file has. Transparency is dropped.

    Returns:
        A picture of mode "RGB" or "L", 8 bits per channel.

    Raises:
        ValueError: If the file cannot be read for whatever reason, which is given: missing, empty, no picture, cut
            off, damaged, more pixels than Pillow deems safe, 32 bits per channel.
    """
    check_choice("channels", channels, (1, 3))
    by_suffix = readable_suffixes().get(Path(path).suffix.lower())
    formats = (*FORMATS, by_suffix) if by_suffix in FORMATS_BY_SUFFIX else FORMATS
    try:
        if not stat.S_ISREG(mode := Path(path).stat().st_mode) and not stat.S_ISDIR(mode):
            raise ValueError("it is no regular file")  # which one may wait for for ever
        with _quiet, Image.open(path, formats=[name for name in formats if name in Image.OPEN]) as image:
            if image.width * image.height > MAX_PIXELS:  # where somebody has switched Pillow's own limit off
                raise ValueError(f"it has {image.width}x{image.height} pixels, more than {MAX_PIXELS:,}")
            image.load()
            picture = _eight_bits(_upright(image), sixteen=image.format in ("PNG", "PPM")).convert("RGB")
    except Exception as error:  # decoders raise what they stumble over: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"cannot read picture {str(path)!r}: {_reason(path, error)}") from error
    return picture.convert("L") if channels == 1 else picture


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data does not make the pixels unreadable
        return image


def _eight_bits(image: Image.Image, *, sixteen: bool) -> Image.Image:
    """Scale 16-bit grayscale, which ``convert("RGB")`` clips, to 8 bits; leave the rest.

    Args:
        image: Any picture.
        sixteen: Whether mode "I" means 16 bits, as it does in PGM files and, with older Pillows, in PNGs.
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


def check_size(size: Size) -> None:
    """Raise TypeError or ValueError unless a size is a positive integer or a pair (height, width) of such."""
    if isinstance(size, (list, tuple)):
        check_ints("size", size, low=1, length=2, why="height, width")
    else:
        check_int("size", size, low=1)


def resize(picture: Image.Image, *, size: Size) -> Image.Image:
    """Resize a picture, bilinear and antialiased.

    Args:
        picture: Any 8-bit picture.
        size: The shorter side in pixels, keeping the aspect ratio, or (height, width).

    Returns:
        The resized picture; the same object if it has that size already.

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
