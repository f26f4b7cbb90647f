"""``resbackbone bench``: how fast a backbone is on this machine, as it is and optimised."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resbackbone.cli.console import results, say, user_errors

if TYPE_CHECKING:
    from torch import nn


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
) -> None:
    """Time a backbone in turn with what `optimize` and `quantize` make of it, in one process, on the same images."""
    import torch

    from resbackbone import build_backbone
    from resbackbone.benchmarking import about_machine, alternate, matmul_rate, seconds
    from resbackbone.cli.features import check_device
    from resbackbone.complexity import measure
    from resbackbone.images import parse_size

    with user_errors():
        pixels = parse_size(size)
        height, width = (pixels, pixels) if isinstance(pixels, int) else pixels
        if threads is not None:
            torch.set_num_threads(threads)
        check_device(device)
        net = build_backbone(config).eval().to(device)
        images = torch.randn(batch, net.in_channels, height, width, device=device)
        starts: dict[str, float] = {}
        calls: dict[str, Callable[[], Any]] = {}
        with torch.no_grad():
            for name, make in _ways(net, images, compiled).items():
                made: list[Callable[..., Any]] = []
                starts[name] = seconds(lambda make=make, made=made: made.append(make()))  # type: ignore[misc]
                starts[name] += seconds(partial(made[0], images))
                calls[name] = partial(made[0], images)
            medians = alternate(calls, runs=runs)
        operations = 2 * batch * measure(net, size=(height, width)).macs
        peaks = {name: matmul_rate(getattr(torch, name), device=device) for name in ("float32", "bfloat16")}
    figures = {
        name: {
            "seconds": taken,
            "images per second": batch / taken,
            "times as fast": medians["as it is"] / taken,
            "operations per second": operations / taken,
            "start-up seconds": starts[name],
        }
        for name, taken in medians.items()
    }
    _print(f"{config}, {batch}x{net.in_channels}x{height}x{width}", figures)
    say(", ".join(f"{key} {value}" for key, value in about_machine().items()))
    say("matrix products: " + ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in peaks.items()))
    if out is not None:
        about = {"config": config, "shape": list(images.shape), "machine": about_machine(), "matmul": peaks}
        out.write_text(json.dumps(about | {"ways": figures}, indent=1))


def _ways(net: nn.Module, images: Any, compiled: bool) -> dict[str, Callable[[], Any]]:
    """What is timed; the first is the net itself."""
    from resbackbone.inference import optimize, quantize

    ways: dict[str, Callable[[], Any]] = {
        "as it is": lambda: net,
        "optimize, float32": partial(optimize, net),
        "optimize, bfloat16": partial(optimize, net, "bfloat16"),
    }
    if images.is_cuda:
        ways["optimize, float16"] = partial(optimize, net, "float16")
    else:
        ways["quantize, int8"] = partial(quantize, net, [images])
    if compiled:
        ways["torch.compile"] = partial(optimize, net, backend="compile")
    return ways


def _print(title: str, figures: dict[str, dict[str, float]]) -> None:
    from rich.table import Table

    table = Table("way", title=title)
    for column in ("ms", "images/s", "times as fast", "GFLOP/s", "start-up, s"):
        table.add_column(column, justify="right")
    for name, row in figures.items():
        table.add_row(
            name,
            f"{row['seconds'] * 1e3:.1f}",
            f"{row['images per second']:.1f}",
            f"{row['times as fast']:.2f}",
            f"{row['operations per second'] / 1e9:.0f}",
            f"{row['start-up seconds']:.2f}",
        )
    results.print(table)
