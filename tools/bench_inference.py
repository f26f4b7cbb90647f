"""Time backbones' inference: ours as it is and optimised, beside the same net of other libraries.

All of them run in one process, in turn, on the same images; medians are compared, not single runs. Every feature map of
four stages is computed. ``python tools/bench_inference.py --peers torchvision,timm``.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peers import import_torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor

from resbackbone import build_backbone
from resbackbone.inference import optimize

Net = Callable[[Tensor], Any]
SHAPES = {"1x224x224": (1, 224, 224), "8x224x224": (8, 224, 224), "1x800x1216": (1, 800, 1216)}
STREAM = [(320 + 48 * (index % 11), 384 + 64 * (index % 9)) for index in range(60)]  # 60 sizes, no two alike


def ours(config: str) -> dict[str, Net]:
    """Our paths; the first is what the ratios are of."""
    net = build_backbone(config).eval()
    return {
        "resbackbone": net,
        "resbackbone channels_last": optimize(net, backend="eager"),
        "optimize float32": optimize(net),
        "optimize bfloat16": optimize(net, "bfloat16"),
    }


def torchvision_net() -> Net:
    """The ResNet-50 of torchvision with four feature maps."""
    torchvision = import_torchvision()
    from torchvision.models._utils import IntermediateLayerGetter

    layers = {f"layer{stage}": str(stage) for stage in (1, 2, 3, 4)}
    net: Net = IntermediateLayerGetter(torchvision.models.resnet50().eval(), layers)
    return net


def timm_net() -> Net:
    """The ResNet-50 of timm with four feature maps."""
    import_torchvision()
    import timm

    net: Net = timm.create_model("resnet50", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    return net


def compiled_net() -> Net:
    """Ours through torch.compile, in channels_last."""
    net: Net = torch.compile(build_backbone("resnet50").eval().to(memory_format=torch.channels_last))
    return net


PEERS: dict[str, Callable[[], Net]] = {
    "torchvision": torchvision_net,
    "timm": timm_net,
    "torch.compile": compiled_net,
}


@torch.no_grad()
def seconds(net: Net, x: Tensor) -> float:
    """Time one pass."""
    start = time.perf_counter()
    net(x)
    return time.perf_counter() - start


def alternate(nets: dict[str, Net], x: Tensor, runs: int) -> dict[str, float]:
    """Return the median of each net over runs in turn, behind three to warm up."""
    for net in nets.values():
        for _ in range(3):
            seconds(net, x)
    times: dict[str, list[float]] = {name: [] for name in nets}
    for _ in range(runs):
        for name, net in nets.items():
            times[name].append(seconds(net, x))
    return {name: statistics.median(values) for name, values in times.items()}


def stream(nets: dict[str, Net]) -> dict[str, float]:
    """Return how long each net takes for images of many sizes, each seen for the first time, in turn."""
    taken = dict.fromkeys(nets, 0.0)
    for height, width in STREAM:
        x = torch.randn(1, 3, height, width)
        for name, net in nets.items():
            taken[name] += seconds(net, x)
    return taken


def main(
    config: Annotated[str, typer.Option(help="Our architecture; peers are ResNet-50 whatever it is.")] = "resnet50",
    peers: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(PEERS)}.")] = "torchvision,timm",
    runs: Annotated[int, typer.Option(min=1, help="Timed runs of each.")] = 9,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Compare the inference of a backbone with that of its peers."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    names = [name for name in peers.split(",") if name]
    if unknown := set(names) - set(PEERS):
        raise typer.BadParameter(f"unknown peer {min(unknown)!r}; known: {', '.join(PEERS)}", param_hint="--peers")
    nets = ours(config) | {name: PEERS[name]() for name in names}
    figures = {
        shape: alternate(nets, torch.randn(batch, 3, height, width), runs)
        for shape, (batch, height, width) in SHAPES.items()
    }
    first, *_ = nets
    figures["60 sizes"] = stream(ours(config) | {name: PEERS[name]() for name in names})
    table = Table("path", *figures, title=f"{config}: ms, and times as fast as `{first}`")
    for name in nets:
        row = [f"{times[name] * 1e3:.1f}  {times[first] / times[name]:.2f}x" for times in figures.values()]
        table.add_row(name, *row)
    Console(width=120).print(table)
    if out is not None:
        about = {"torch": torch.__version__, "threads": threads, "machine": platform.machine(), "runs": runs}
        out.write_text(json.dumps({"about": about, "config": config, "seconds": figures}, indent=1))


if __name__ == "__main__":
    typer.run(main)
