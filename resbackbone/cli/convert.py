"""``resbackbone convert``: a checkpoint in another library's key layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resbackbone.cli.console import echo, stderr, user_errors


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A file, a name that `resbackbone list --weights` shows, or a URL.")
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="A .pth, .safetensors, .npz, or, of arrays, .pkl or .pdparams file.")
    ],
    *,
    to: Annotated[
        str, typer.Option(metavar="LAYOUT", help="The key layout to write: native, timm, detectron2, huggingface, ...")
    ],
    layout: Annotated[
        str | None, typer.Option("--from", metavar="LAYOUT", help="The key layout of SRC.", show_default="detected")
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(help="Key prefix of the backbone, if SRC has several.", show_default="detected"),
    ] = None,
) -> None:
    """Convert the backbone of a checkpoint, with its classifier, to the key layout of another library."""
    from resbackbone.checkpoints import save_weights
    from resbackbone.checkpoints.conversion import find_backbone
    from resbackbone.checkpoints.layouts import get_layout
    from resbackbone.checkpoints.tensors import read_tensors

    with user_errors():
        target = get_layout(to)
        content = read_tensors(source)
        found = find_backbone(content.tensors, layout, prefix, from_mmengine=content.from_mmengine)
        converted = target.to_foreign(found.native)
        save_weights(converted, destination)
    if found.copies:
        others = ", ".join(map(repr, found.copies))
        echo(f"converted the backbone with prefix {found.prefix!r}, not {others}; choose with --prefix", console=stderr)
    echo(f"{len(converted)} tensors, {found.layout.name} to {target.name}: {destination}", style="green")
    if found.others:
        echo(f"{len(found.others)} outside the backbone left out, such as {found.others[0]}")
    if content.not_loaded:
        echo(f"not loaded: {', '.join(content.not_loaded)}")
