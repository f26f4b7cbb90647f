"""``resbackbone bench``: how fast a backbone is on this machine, as it is and optimized."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resbackbone.cli.console import Imports, check_file, import_named, say, user_errors

if TYPE_CHECKING:
    from torch import nn

_COLUMNS = ("ms", "images/s", "times as fast", "GFLOP/s", "start-up, s")


def bench(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A name that `resbackbone list` shows, or a .yaml or .py file.")
    ],
    *,
    size: Annotated[str, typer.Option(help="Of the images: side in pixels, or HEIGHTxWIDTH.")] = "224",
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 1,
    runs: Annotated[int, typer.Option(min=1, help="Timed runs of each way; the median counts.")] = 9,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the processor.", show_default="PyTorch's")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile too, which takes a minute.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    imports: Imports = None,
) -> None:
    """Time a backbone, and in turn with it, on the same images, what `optimize` and `quantize` make of it.

    A row appears as soon as it is measured. What this processor has no instructions for is skipped.
    """
    import torch

    from resbackbone import build_backbone
    from resbackbone.analysis.benchmark import describe_machine, matmul_rate
    from resbackbone.analysis.cost import measure
    from resbackbone.config import load_config
    from resbackbone.data.pictures import parse_size
    from resbackbone.utils import processor
    from resbackbone.utils.atomic_write import atomic_write
    from resbackbone.utils.devices import check_device

    with user_errors():
        import_named(imports)
        check_file("--out", out)
        pixels = parse_size(size)
        height, width = (pixels, pixels) if isinstance(pixels, int) else pixels
        if threads is not None:
            torch.set_num_threads(threads)
        check_device(device)
        load_config(config)
        dtypes = ["float32", "bfloat16"]
        if device == "cpu" and processor.computed_dtype(torch.bfloat16) is not torch.bfloat16:
            dtypes.remove("bfloat16")
        names = _names(device, compiled, dtypes)
        shown = f"{_counted(batch, 'image')} of {height}x{width} on {device}, {_counted(runs, 'run')} each"
        say(f"{config}, {shown}: {'; '.join(names)}")
        if "bfloat16" not in dtypes:
            say(f"bfloat16 is skipped: {processor.reason(torch.bfloat16)}, and `optimize` computes in float32")
        net = build_backbone(config).to(device)
        net.eval()
        images = torch.randn(batch, net.in_channels, height, width, device=device)
        say("{:<20}{:>10}{:>12}{:>16}{:>10}{:>14}".format("way", *_COLUMNS))
        operations = 2 * batch * measure(net, size=(height, width)).macs
        figures = {}
        for name in names:
            figures[name] = _time(net, name, images, runs, operations)
            say(_row(name, figures[name]))
        say(", ".join(f"{key} {value}" for key, value in describe_machine().items()))
        peaks = {}
        for name in dtypes:
            peaks[name] = matmul_rate(getattr(torch, name), device=device)
            say(f"matrix products, {name}: {peaks[name] / 1e9:.0f} GFLOP/s")
        if out is not None:
            about = {"config": config, "shape": list(images.shape), "machine": describe_machine(), "matmul": peaks}
            with atomic_write(out) as path:
                path.write_text(json.dumps(about | {"ways": figures}, indent=1))


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _names(device: str, compiled: bool, dtypes: list[str]) -> list[str]:
    """What is timed; the first is the net itself."""
    last = "optimize, float16" if device.startswith("cuda") else "quantize, int8"
    names = ["as it is", *(f"optimize, {dtype}" for dtype in dtypes), last]
    return [*names, "torch.compile"] if compiled else names


def _make(net: nn.Module, name: str, images: Any) -> nn.Module:
    from resbackbone.inference import optimize, quantize

    if name == "as it is":
        return net
    if name == "torch.compile":
        return optimize(net, backend="compile")
    if name == "quantize, int8":
        return quantize(net, [images])
    return optimize(net, name.removeprefix("optimize, "))  # type: ignore[arg-type]


def _time(net: nn.Module, name: str, images: Any, runs: int, operations: int) -> dict[str, float]:
    """Time what is made of a net in turn with the net, so that what disturbs the machine disturbs both."""
    import torch

    from resbackbone.analysis.benchmark import time_alternating, time_call

    made: list[nn.Module] = []
    # What is optimized returns feature maps in the format of the images; in this one it need not convert them.
    given = images if name == "as it is" else images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        start = time_call(lambda: made.append(_make(net, name, images)))
        start += time_call(partial(made[0], given))
        medians = time_alternating({"as it is": partial(net, images), name: partial(made[0], given)}, runs=runs)
    taken = medians[name]
    return {
        "seconds": taken,
        "images per second": len(images) / taken,
        "times as fast": medians["as it is"] / taken,
        "operations per second": operations / taken,
        "start-up seconds": start,
    }


def _row(name: str, figures: dict[str, float]) -> str:
    return (
        f"{name:<20}{figures['seconds'] * 1e3:>10.1f}{figures['images per second']:>12.1f}"
        f"{figures['times as fast']:>16.2f}{figures['operations per second'] / 1e9:>10.0f}"
        f"{figures['start-up seconds']:>14.2f}"
    )
