"""``resbackbone extract``: feature pyramids of pictures, as files."""

from __future__ import annotations

import os
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resbackbone.cli.console import messages, one_line, say, user_errors, with_progress

if TYPE_CHECKING:
    from resbackbone.cli.features import Extractor, Features
    from resbackbone.images import Size


class Dtype(str, Enum):
    """Number format that the backbone computes in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"


class Format(str, Enum):
    """Files that features are written to."""

    NPY = "npy"
    SAFETENSORS = "safetensors"


def extract(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A name that `resbackbone list` shows, or a .yaml or .py file.")
    ],
    pictures: Annotated[list[Path], typer.Argument(metavar="PICTURE", help="Pictures and folders of pictures.")],
    *,
    out: Annotated[Path, typer.Option(help="Folder for the results; each picture gets a folder of its name in it.")],
    checkpoint: Annotated[
        str | None, typer.Option(help="Weights: a file, a name that `resbackbone list --weights` shows, or a URL.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="Number format; bfloat16 is float32 in .npy files.")] = Dtype.FLOAT32,
    size: Annotated[
        str | None, typer.Option(help="Resize first: shorter side in pixels, or HEIGHTxWIDTH.", show_default="as it is")
    ] = None,
    fpn: Annotated[bool, typer.Option("--fpn", help="An FPN of 256 channels on top: p2 to p6.")] = False,
    file_format: Annotated[
        Format, typer.Option("--format", help="One .npy per level, or one features.safetensors.")
    ] = Format.NPY,
) -> None:
    """Write every feature map of each picture, (channels, height, width), and pyramid.png, an overview.

    Results of an earlier run are replaced. Without a checkpoint the weights are random, the same in every run. A
    picture that cannot be read is reported and left out; the exit status is 1 then.
    """
    from resbackbone.cli.features import Extractor
    from resbackbone.images import find_images, parse_size

    with user_errors():
        pixels = None if size is None else parse_size(size)
        found = find_images(pictures, leave_out=out)
        _make_folder(out, found)
        extractor = Extractor(config, checkpoint=checkpoint, device=device, dtype=dtype.value, fpn=fpn)
    for line in extractor.about_weights:
        say(line)
    failures: dict[Path, str] = {}
    done: list[Path] = []
    for path, name in with_progress(found.items(), "extracting"):
        try:
            done.append(_extract_one(extractor, path, out / name, size=pixels, file_format=file_format))
        except (ValueError, RuntimeError, MemoryError, OSError) as error:
            # RuntimeError is how torch says that memory ran out, or that a picture is too small for a norm.
            failures[path] = one_line(error)
            reason = failures[path] if str(path) in failures[path] else f"{path}: {failures[path]}"
            say(f"skipped: {reason}", style="red", console=messages)
    _summarise(done, failures, out)


def _make_folder(out: Path, found: dict[Path, Path]) -> None:
    for path, name in found.items():
        if (out / name).is_file():
            raise ValueError(f"the results of {path} need a folder {out / name}, which is a file; give another --out")
    out.mkdir(parents=True, exist_ok=True)


def _extract_one(extractor: Extractor, path: Path, folder: Path, *, size: Size | None, file_format: Format) -> Path:
    """Write one picture's files into a folder, and return the path of the overview, which is written last."""
    from resbackbone.images import read_image, resize

    picture = read_image(path, channels=extractor.in_channels)
    if size is not None:
        picture = resize(picture, size=size)
    features = extractor(picture)
    if bad := features.not_finite():
        say(f"{path}: infinite or NaN in {', '.join(bad)}; try another --dtype", style="yellow", console=messages)
    overview = features.draw(picture, title=f"{path.name}   {extractor.title}")
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in _writers(features, file_format).items():
        _write(folder / name, write)
    _write(folder / "pyramid.png", lambda temporary: overview.save(temporary, format="PNG"))
    return folder / "pyramid.png"


def _writers(features: Features, file_format: Format) -> dict[str, Callable[[Path], None]]:
    """What writes each file."""
    if file_format is Format.SAFETENSORS:
        return {"features.safetensors": features.save_safetensors}
    return {f"{name}.npy": partial(features.save_npy, name) for name in features.maps}


def _write(path: Path, write: Callable[[Path], None]) -> None:
    """Let a file appear under its name only when it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _summarise(done: list[Path], failures: dict[Path, str], out: Path) -> None:
    """Say what came of it, and end with status 1 where something failed."""
    total = len(done) + len(failures)
    say(f"{len(done)} of {total} picture{'s' if total > 1 else ''} extracted to {out}", style="green" if done else "")
    if done:
        say(f"look at {done[0]}")
    if failures:
        say(f"{len(failures)} skipped", style="red", console=messages)
        raise typer.Exit(1)
