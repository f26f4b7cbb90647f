"""``resbackbone extract``: feature maps of pictures, as files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resbackbone.cli.console import (
    Imports,
    check_folder,
    echo,
    import_user_modules,
    printable,
    stderr,
    user_errors,
    with_progress,
)

if TYPE_CHECKING:
    from resbackbone.extraction import DistributedContext, ExtractionSummary, PictureResult


class Dtype(str, Enum):
    """Number format that the backbone computes in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"


class Backend(str, Enum):
    """A backend of ``optimize``, or "plain" for the backbone unchanged."""

    AUTO = "auto"
    ONEDNN = "onednn"
    COMPILE = "compile"
    EAGER = "eager"
    PLAIN = "plain"


class Format(str, Enum):
    """File format of the feature maps."""

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
    dtype: Annotated[Dtype, typer.Option(help="Number format; .npy files hold bfloat16 as float32.")] = Dtype.FLOAT32,
    backend: Annotated[
        Backend, typer.Option(help="How to optimize the backbone; plain: not at all, bit-identical to PyTorch.")
    ] = Backend.AUTO,
    size: Annotated[
        str | None, typer.Option(help="Resize first: shorter side in pixels, or HEIGHTxWIDTH.", show_default="as it is")
    ] = None,
    fpn: Annotated[bool, typer.Option("--fpn", help="Outputs of an FPN with 256 channels instead: p2 to p6.")] = False,
    file_format: Annotated[
        Format, typer.Option("--format", help="One .npy per level, or one features.safetensors.")
    ] = Format.NPY,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Batch up to this many consecutive pictures of one size; of large ones fewer.")
    ] = 8,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep results that are complete and were made with the same settings.")
    ] = False,
    imports: Imports = None,
) -> None:
    """Write each feature map of each picture, (channels, height, width), and pyramid.png, an overview.

    Results of an earlier run are replaced. Without a checkpoint the weights are random, the same in every run. A
    picture that cannot be read is reported and skipped; the exit status is 1 then. Under torchrun each process extracts
    its share of the pictures.
    """
    from resbackbone import extraction
    from resbackbone.data.pictures import parse_size
    from resbackbone.utils.allocator import keep_freed_memory

    keep_freed_memory()
    with user_errors():
        import_user_modules(imports)
        check_folder("--out", out)
        with extraction.DistributedContext.from_environment() as distributed:

            def show(results: Iterable[PictureResult], total: int) -> Iterator[PictureResult]:
                for result in with_progress(results, "extracting", total=total, shown=distributed.rank == 0):
                    _print_problems(result)
                    yield result

            summary = extraction.extract(
                config,
                pictures,
                out=out,
                checkpoint=checkpoint,
                device=device,
                dtype=dtype.value,
                backend=backend.value,
                size=None if size is None else parse_size(size),
                fpn=fpn,
                file_format=file_format.value,
                batch_size=batch_size,
                resume=resume,
                progress=show,
                report=echo,
                warn=_warn,
                distributed=distributed,
            )
            _print_summary(summary, out, distributed)
    if summary.errors:
        raise typer.Exit(1)


def _warn(text: str) -> None:
    echo(text, style="yellow", console=stderr)


def _print_problems(result: PictureResult) -> None:
    path = printable(result.path)
    if result.status == "failed":
        reason = result.error if repr(str(result.path)) in result.error else f"{path}: {result.error}"
        echo(f"skipped: {reason}", style="red", console=stderr)
    if result.non_finite:
        _warn(f"{path}: infinite or NaN in {', '.join(result.non_finite)}; try another --dtype")


def _print_summary(summary: ExtractionSummary, out: Path, distributed: DistributedContext) -> None:
    """Print the counts: of all ranks in the first, or, where they are not connected, of each in its own."""
    if distributed.is_connected and distributed.rank > 0:
        return
    extracted = summary.num_extracted + summary.num_kept
    total = extracted + summary.num_failed
    alone = distributed.world_size > 1 and not distributed.is_connected
    who = f"rank {distributed.rank} of {distributed.world_size}: " if alone else ""
    kept = f", {summary.num_kept} of them by an earlier run" if summary.num_kept else ""
    text = f"{who}{extracted} of {total} picture{'' if total == 1 else 's'} extracted to {out}{kept}"
    echo(text, style="green" if extracted else "")
    if summary.overview is not None:
        echo(f"look at {printable(summary.overview)}")
    if summary.num_failed:
        echo(f"{summary.num_failed} skipped", style="red", console=stderr)
