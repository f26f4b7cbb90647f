"""``resbackbone extract``: feature pyramids of pictures, as files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resbackbone.cli.console import (
    Imports,
    check_folder,
    import_named,
    messages,
    printable,
    say,
    user_errors,
    with_progress,
)

if TYPE_CHECKING:
    from resbackbone.cli.pipeline import Job, Outcome
    from resbackbone.cli.ranks import Ranks


class Dtype(str, Enum):
    """Number format that the backbone computes in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"


class Backend(str, Enum):
    """What computes: a backend of ``optimize``, or the net as it is."""

    AUTO = "auto"
    ONEDNN = "onednn"
    COMPILE = "compile"
    EAGER = "eager"
    PLAIN = "plain"


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
    backend: Annotated[
        Backend, typer.Option(help="How `optimize` makes it faster; plain for the net as it is, to the bit.")
    ] = Backend.AUTO,
    size: Annotated[
        str | None, typer.Option(help="Resize first: shorter side in pixels, or HEIGHTxWIDTH.", show_default="as it is")
    ] = None,
    fpn: Annotated[bool, typer.Option("--fpn", help="An FPN of 256 channels on top: p2 to p6.")] = False,
    file_format: Annotated[
        Format, typer.Option("--format", help="One .npy per level, or one features.safetensors.")
    ] = Format.NPY,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Consecutive pictures of one size at a time; of large ones fewer.")
    ] = 8,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep results that are complete and made with the same settings.")
    ] = False,
    imports: Imports = None,
) -> None:
    """Write every feature map of each picture, (channels, height, width), and pyramid.png, an overview.

    Results of an earlier run are replaced. Without a checkpoint the weights are random, the same in every run. A
    picture that cannot be read is reported and left out; the exit status is 1 then. Under torchrun each process takes
    its share of the pictures.
    """
    from resbackbone.cli.features import Extractor
    from resbackbone.cli.pipeline import Job, Pipeline
    from resbackbone.cli.ranks import Ranks, own_device
    from resbackbone.cli.result_files import ResultFiles
    from resbackbone.data.pictures import describe_left_out, find_images, parse_size
    from resbackbone.utils.allocator import keep_freed_memory

    keep_freed_memory()
    with user_errors():
        import_named(imports)
        ranks = Ranks.from_environment()
        pixels = None if size is None else parse_size(size)
        check_folder("--out", out)
        left_out: dict[Path, str] = {}
        found = find_images(pictures, leave_out=out, on_left_out=left_out.__setitem__)
        jobs = [Job(path, out / name) for path, name in ranks.share(found).items()]
        _make_folder(out, jobs)
        extractor = Extractor(
            config,
            checkpoint=checkpoint,
            device=own_device(device),
            dtype=dtype.value,
            fpn=fpn,
            backend=backend.value,
        )
    files = ResultFiles({**extractor.settings, "size": pixels}, extractor.levels, file_format.value)
    pipeline = Pipeline(extractor, files, size=pixels, batch_size=batch_size, resume=resume, warn=_warn)
    with user_errors(RuntimeError):
        ranks.join()
    if ranks.rank == 0:
        for line in extractor.about:
            say(line)
        for line in describe_left_out(left_out):
            _warn(line)
    with closing(pipeline.run(jobs)) as outcomes:
        done, counts = _report(with_progress(outcomes, "extracting", total=len(jobs), shown=ranks.rank == 0))
    _summarise(ranks, out, done, counts)


def _make_folder(out: Path, jobs: Iterable[Job]) -> None:
    for job in jobs:
        if job.folder.is_file():
            raise ValueError(
                f"the results of {job.path} need a folder {job.folder}, which is a file; give another --out"
            )
    out.mkdir(parents=True, exist_ok=True)


def _warn(text: str) -> None:
    say(text, style="yellow", console=messages)


def _report(outcomes: Iterable[Outcome]) -> tuple[Path | None, Counter[str]]:
    """Say what went wrong as it comes; return a folder of results, and how many there are of each outcome."""
    first = None
    counts: Counter[str] = Counter()
    for outcome in outcomes:
        path = printable(outcome.job.path)
        counts[outcome.status] += 1
        if outcome.status == "failed":
            reason = outcome.error if repr(str(outcome.job.path)) in outcome.error else f"{path}: {outcome.error}"
            say(f"skipped: {reason}", style="red", console=messages)
        else:
            first = first or outcome.job.folder
        if outcome.not_finite:
            _warn(f"{path}: infinite or NaN in {', '.join(outcome.not_finite)}; try another --dtype")
    return first, counts


def _summarise(ranks: Ranks, out: Path, folder: Path | None, counts: Counter[str]) -> None:
    """Say what came of it, the first rank for all, and end with status 1 where something failed."""
    from resbackbone.cli.result_files import OVERVIEW

    with user_errors(RuntimeError):
        extracted, kept, failed = ranks.sum(*(counts[status] for status in ("extracted", "kept", "failed")))
    if ranks.rank == 0 or not ranks.connected:
        total = extracted + kept + failed
        who = f"rank {ranks.rank} of {ranks.world_size}: " if ranks.world_size > 1 and not ranks.connected else ""
        earlier = f", {kept} of them by an earlier run" if kept else ""
        text = f"{who}{extracted + kept} of {total} picture{'' if total == 1 else 's'} extracted to {out}{earlier}"
        say(text, style="green" if extracted + kept else "")
        if folder is not None:
            say(f"look at {printable(folder / OVERVIEW)}")
        if failed:
            say(f"{failed} skipped", style="red", console=messages)
    with user_errors(RuntimeError):
        ranks.leave()
    if counts["failed"]:
        raise typer.Exit(1)
