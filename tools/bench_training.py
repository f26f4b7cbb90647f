"""Measure training steps of a backbone: what is kept for the backward pass, and how long a step takes.

The ways run in one process and in turn on the same images; medians are compared. Time is the processor time of the
process, which others on the machine disturb less. ``python tools/bench_training.py --size 640 640``.
"""

from __future__ import annotations

import gc
import statistics
import time
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from resbackbone import build_backbone
from resbackbone.layers.recomputing import WithCp

WAYS: dict[str, WithCp] = {"plain": False, 'with_cp="norms"': "norms", "with_cp=True": True}


def kept_bytes(net: nn.Module, images: Tensor) -> int:
    """Count what lies in memory behind the forward pass that was not there before it."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        outs = net(images)
    del outs  # only now
    return sum(event.self_cpu_memory_usage for event in events.key_averages())


def step_seconds(net: nn.Module, images: Tensor) -> float:
    """Time a forward and backward pass."""
    net.zero_grad()
    start = time.process_time()
    sum(out.square().mean() for out in net(images)).backward()
    return time.process_time() - start


def main(
    config: str = "resnet50",
    size: Annotated[tuple[int, int], typer.Option(help="Height and width in pixels.")] = (640, 640),
    batch: int = 2,
    runs: int = 5,
    channels_last: bool = False,
) -> None:
    """Print a table."""
    images = torch.randn(batch, 3, *size)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    images = images.contiguous(memory_format=memory_format)
    nets = {
        way: build_backbone(config, norm_eval=False, with_cp=with_cp).to(memory_format=memory_format)  # type: ignore[call-overload]
        for way, with_cp in WAYS.items()
    }
    kept = {way: kept_bytes(net, images) for way, net in nets.items()}
    seconds: dict[str, list[float]] = {way: [] for way in nets}
    for _ in range(runs):
        for way, net in nets.items():
            seconds[way].append(step_seconds(net, images))
    times = {way: statistics.median(values) for way, values in seconds.items()}
    title = f"{config}, {batch}x3x{size[0]}x{size[1]}"
    table = Table("way", "kept, MiB", "of plain", "step, s", "of plain", title=title)
    for way in nets:
        ratios = f"{kept[way] / kept['plain']:.2f}", f"{times[way] / times['plain']:.2f}"
        table.add_row(way, f"{kept[way] / 2**20:.0f}", ratios[0], f"{times[way]:.2f}", ratios[1])
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
