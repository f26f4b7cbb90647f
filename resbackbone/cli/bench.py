"""``resbackbone bench``: the speed of a backbone on this machine, plain and optimized."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resbackbone.cli.console import Imports, check_file, echo, import_user_modules, user_errors

if TYPE_CHECKING:
    from resbackbone.analysis.benchmark import Timing

_COLUMNS = ("ms", "images/s", "speedup", "GFLOP/s", "start-up, s")


def bench(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A name that `resbackbone list` shows, or a .yaml or .py file.")
    ],
    *,
    size: Annotated[str, typer.Option(help="Image size in pixels: one side of a square, or HEIGHTxWIDTH.")] = "224",
    batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 1,
    runs: Annotated[int, typer.Option(min=1, help="Timed runs of each variant; the median counts.")] = 9,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="PyTorch's")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    compiled: Annotated[bool, typer.Option("--compile", help="Also with torch.compile, which takes a minute.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
    imports: Imports = None,
) -> None:
    """Benchmark a backbone on this machine: plain, optimized and quantized.

    Each row appears as soon as it is measured. Number formats without instructions of this processor are skipped.
    """
    import torch

    from resbackbone import build_backbone
    from resbackbone.analysis import benchmark
    from resbackbone.config import load_config
    from resbackbone.data.pictures import parse_size
    from resbackbone.utils import processor
    from resbackbone.utils.atomic_write import atomic_write
    from resbackbone.utils.devices import check_device

    with user_errors():
        import_user_modules(imports)
        check_file("--out", out)
        pixels = parse_size(size)
        height, width = (pixels, pixels) if isinstance(pixels, int) else pixels
        if threads is not None:
            torch.set_num_threads(threads)
        check_device(device)
        load_config(config)
        dtypes = benchmark.benchmarked_dtypes(device)
        variants = benchmark.list_variants(device, compiled=compiled)
        num_images, num_runs = _with_noun(batch, "image"), _with_noun(runs, "run")
        echo(f"{config}, {num_images} of {height}x{width} on {device}, {num_runs} each: {'; '.join(variants)}")
        if "bfloat16" not in dtypes:
            echo(f"bfloat16 is skipped: {processor.reason(torch.bfloat16)}, and `optimize` computes in float32")
        net = build_backbone(config).to(device).eval()
        images = torch.randn(batch, net.in_channels, height, width, device=device)
        echo("{:<20}{:>10}{:>12}{:>10}{:>10}{:>14}".format("variant", *_COLUMNS))
        timings = {}
        for variant in variants:
            timings[variant] = benchmark.time_variant(net, variant, images, runs=runs)
            echo(_row(variant, timings[variant]))
        machine = benchmark.describe_machine()
        echo(", ".join(f"{key} {value}" for key, value in machine.items()))
        rates = {}
        for dtype in dtypes:
            rates[dtype] = benchmark.matmul_rate(getattr(torch, dtype), device=device)
            echo(f"matrix products, {dtype}: {rates[dtype] / 1e9:.0f} GFLOP/s")
        if out is not None:
            figures = {"config": config, "shape": list(images.shape), "machine": machine, "matmul": rates}
            figures["variants"] = {variant: asdict(timing) for variant, timing in timings.items()}
            with atomic_write(out) as path:
                path.write_text(json.dumps(figures, indent=1))


def _with_noun(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _row(variant: str, timing: Timing) -> str:
    return (
        f"{variant:<20}{timing.seconds * 1e3:>10.1f}{timing.images_per_second:>12.1f}{timing.speedup:>10.2f}"
        f"{timing.flops_per_second / 1e9:>10.1f}{timing.startup_seconds:>14.2f}"
    )
