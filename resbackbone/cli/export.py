"""``resbackbone export``: a backbone as a file that runs without this package."""

from __future__ import annotations

from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from resbackbone.cli.console import Imports, check_file, echo, import_user_modules, stderr, user_errors


class Target(str, Enum):
    """File format."""

    ONNX = "onnx"
    TORCH_EXPORT = "torch-export"
    AOTI = "aoti"


class Dtype(str, Enum):
    """Number format of the computation."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


def export(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A name that `resbackbone list` shows, or a .yaml or .py file.")
    ],
    *,
    to: Annotated[
        Target, typer.Option(help="ONNX, a torch.export archive, or code compiled by AOTInductor for this machine.")
    ] = Target.ONNX,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Output file.", show_default="NAME.onnx or NAME.pt2")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Weights: a file, a name that `resbackbone list --weights` shows, or a URL.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Number format; not bfloat16 for ONNX.")] = Dtype.FLOAT32,
    size: Annotated[
        str | None,
        typer.Option(help="Fixed image size in pixels: one side of a square, or HEIGHTxWIDTH.", show_default="any"),
    ] = None,
    imports: Imports = None,
) -> None:
    """Export a backbone to a file, for any batch size and image size.

    The outputs of the file are compared with the backbone's before it is moved to its name. Without a checkpoint, the
    weights are initialized by the config.
    """
    from resbackbone import __version__, build_backbone
    from resbackbone.checkpoints import load_checkpoint
    from resbackbone.config import config_files
    from resbackbone.data.pictures import parse_size
    from resbackbone.inference import export as export_net
    from resbackbone.inference.export_formats import EXPORT_FORMATS

    with user_errors():
        import_user_modules(imports)
        check_file("--out", out)
        pixels = None if size is None else parse_size(size)
        net = build_backbone(config)
        weights = "as the config initializes them (no checkpoint given)"
        if checkpoint is not None:
            weights = f"{checkpoint} ({load_checkpoint(net, checkpoint).summary()})"
        name = config if config in config_files() else Path(config).stem
        exported = export_net(
            net,
            out or Path(name + EXPORT_FORMATS[to.value].suffix),
            to.value,
            dtype=dtype.value,
            size=(pixels, pixels) if isinstance(pixels, int) else pixels,
            metadata={"config": name, "weights": weights, "resbackbone": __version__},
            report=partial(echo, console=stderr),
        )
    echo(f"weights: {weights}")
    for level in exported.levels:
        off = exported.differences[level.name]
        echo(f"{level.name}: {level.channels} channels, stride {level.stride}, at most {off:.1e} from the backbone's")
    echo(f"{exported.path} computes what the backbone does", style="green")
