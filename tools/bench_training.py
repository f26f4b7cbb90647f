"""Measure training steps of ResNet-50: ours, beside the same net of other libraries and their ways to make it faster.

All of them run in one process, in turn, on the same images; medians are compared, not single runs. They train as
detectors do, with the stem, the first stage and all statistics frozen; a second group has batch norms in train mode. A
step is a forward and a backward pass; the optimizer's is the same for all. mmdet is measured where it is installed.
``python tools/bench_training.py --keep-freed-memory --docs docs/benchmarks.md``
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import torch._dynamo
import typer
from bench_report import markdown_table, peak_memory, write_section
from peers import mmdet_net, timm_net, torchvision_net
from rich.console import Console
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from resbackbone import build_backbone
from resbackbone.analysis.benchmark import describe_machine, time_alternating
from resbackbone.utils.allocator import keep_freed_memory

FROZEN, TRAINED = "frozen statistics", "norms in train mode"
STEP_SIZE, MEMORY_SIZE = (640, 640), (800, 1216)
BATCH = 2


@dataclass(frozen=True)
class Contestant:
    """A way to train.

    Attributes:
        make: What builds the net.
        group: What it is compared with.
        channels_last: Whether weights and images are in that format.
        dtype: What autocast computes in; None without.
        compiled: Whether torch.compile has its way with the net.
    """

    make: Callable[[], Any]
    group: str = FROZEN
    channels_last: bool = False
    dtype: torch.dtype | None = None
    compiled: bool = False

    def prepare(self, device: str) -> Callable[[Tensor], Any]:
        """Build the net and what runs it."""
        net = self.make().to(device=device, memory_format=self.memory_format)
        return torch.compile(net) if self.compiled else net

    @property
    def memory_format(self) -> torch.memory_format:
        """Of weights and images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def images(self, size: tuple[int, int], device: str) -> Tensor:
        """Draw images as the net takes them."""
        return torch.randn(BATCH, 3, *size, device=device).contiguous(memory_format=self.memory_format)

    def forward(self, net: Callable[[Tensor], Any], images: Tensor) -> list[Tensor]:
        """Compute the feature maps."""
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype is not None):
            outs = net(images)
        return list(outs.values()) if isinstance(outs, dict) else list(outs)

    def step(self, net: nn.Module, images: Tensor) -> None:
        """Run a forward and a backward pass, from gradients as a head returns them."""
        net.zero_grad()
        outs = [out for out in self.forward(net, images) if out.requires_grad]
        torch.autograd.backward(outs, [out.detach() for out in outs])


def freeze_as_detectors(make: Callable[[], Any]) -> Any:
    """Build another library's net and freeze what ours freezes with ``frozen_stages=1`` and ``norm_eval=True``."""
    net = make().eval()  # their blocks do the same in either mode, but for norms
    for name in ("conv1", "bn1", "layer1"):
        net.get_submodule(name).requires_grad_(False)
    return net


def mmdet_training(**options: Any) -> Any:
    """The net of mmdet in train mode, with the stem and the first stage frozen unless options say otherwise."""
    net: Any = mmdet_net(**{"frozen_stages": 1, **options})
    net.train()
    return net


def mmdet_efficient() -> Any:
    """The same with mmengine's convolutions for norms in eval mode."""
    from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval_for_single_model

    net = mmdet_training()
    turn_on_efficient_conv_bn_eval_for_single_model(net)
    return net


def ours(**options: Any) -> Any:
    """Our net in train mode."""
    return build_backbone("resnet50", **options).train()


def contestants() -> dict[str, Contestant]:
    """Every way there is, where its library is installed; the first of each group is what ratios are of."""
    bf16 = torch.bfloat16
    folded = partial(ours, frozen_stages=1, fold_frozen_norms=True)
    plain = partial(ours, frozen_stages=1)
    theirs: dict[str, Callable[[], Any]] = {
        name: partial(freeze_as_detectors, make) for name, make in _installed().items()
    }
    if find_spec("mmdet"):
        theirs = {"mmdet": mmdet_training, **theirs}
    ways = {}
    for name, make in theirs.items():
        ways[name] = Contestant(make)
        ways[f"{name}, channels_last"] = Contestant(make, channels_last=True)
    reference = next(iter(theirs), "resbackbone")
    if "mmdet" in theirs:
        ways["mmdet, efficient_conv_bn_eval"] = Contestant(mmdet_efficient)
        ways["mmdet, efficient_conv_bn_eval, channels_last"] = Contestant(mmdet_efficient, channels_last=True)
    compiling = theirs.get(reference, plain)
    ways |= {
        f"{reference}, torch.compile, channels_last": Contestant(compiling, channels_last=True, compiled=True),
        "resbackbone": Contestant(plain),
        "resbackbone, channels_last": Contestant(plain, channels_last=True),
        "resbackbone, fold_frozen_norms": Contestant(folded),
        "resbackbone, fold_frozen_norms, channels_last": Contestant(folded, channels_last=True),
        "resbackbone, fold_frozen_norms, torch.compile, channels_last": Contestant(
            folded, channels_last=True, compiled=True
        ),
        f"{reference}, autocast": Contestant(compiling, dtype=bf16),
        f"{reference}, autocast, channels_last": Contestant(compiling, channels_last=True, dtype=bf16),
        "resbackbone, autocast, fold_frozen_norms": Contestant(folded, dtype=bf16),
        "resbackbone, autocast, fold_frozen_norms, channels_last": Contestant(folded, channels_last=True, dtype=bf16),
    }
    trained = partial(ours, norm_eval=False)
    ways |= {
        "resbackbone, trained norms": Contestant(trained, TRAINED),
        'resbackbone, trained norms, with_cp="norms"': Contestant(partial(trained, with_cp="norms"), TRAINED),
        "resbackbone, trained norms, with_cp=True": Contestant(partial(trained, with_cp=True), TRAINED),
    }
    if "mmdet" in theirs:
        mmdet_trained = partial(mmdet_training, norm_eval=False, frozen_stages=-1)
        ways["mmdet, trained norms"] = Contestant(mmdet_trained, TRAINED)
        ways["mmdet, trained norms, with_cp=True"] = Contestant(partial(mmdet_trained, with_cp=True), TRAINED)
    return ways


def _installed() -> dict[str, Callable[[], Any]]:
    peers = {"torchvision": torchvision_net, "timm": timm_net}
    return {name: make for name, make in peers.items() if find_spec(name)}


def kept_bytes(way: Contestant, net: Callable[[Tensor], Any], images: Tensor) -> int:
    """Count what a forward pass leaves in memory, the feature maps included, until the backward pass has run."""
    way.step(net, images)  # type: ignore[arg-type]  # compiled, and with what it keeps for good
    gc.collect()
    if images.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        outs = way.forward(net, images)
        kept = torch.cuda.memory_allocated() - before
        del outs  # only now
        return kept
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        outs = way.forward(net, images)
    del outs  # only now
    return sum(event.self_cpu_memory_usage for event in events.key_averages())


def measure_alone(way: Contestant, size: tuple[int, int], device: str) -> dict[str, float]:
    """Measure the memory that steps take from the system, in a process that did nothing else before."""
    net, images = way.prepare(device), way.images(size, device)
    before = peak_memory(device)
    for _ in range(2):
        way.step(net, images)  # type: ignore[arg-type]
    after = peak_memory(device)
    return {"kept": kept_bytes(way, net, images), "peak": after - before}


def alone(name: str, options: list[str]) -> dict[str, float]:
    """Do so in a process of its own."""
    run = subprocess.run(
        [sys.executable, __file__, "--alone", name, *options], stdout=subprocess.PIPE, text=True, check=True
    )
    figures: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return figures


def table(figures: dict[str, Any], ways: dict[str, Contestant]) -> str:
    """Write the figures of one run as Markdown."""
    about = ", ".join(f"{key} {value}" for key, value in figures["about"].items())
    memory, step = ("x".join(map(str, figures[key])) for key in ("memory size", "step size"))
    parts = [f"resnet50, batch {BATCH}; {about}."]
    for group in (FROZEN, TRAINED):
        names = [name for name, way in ways.items() if way.group == group]
        first = names[0]
        rows = []
        for name in names:
            kept, peak = (figures["memory"][name][key] for key in ("kept", "peak"))
            taken = figures["seconds"][name]
            rows.append(
                [
                    name,
                    f"{kept / 2**20:.0f}, {kept / figures['memory'][first]['kept']:.2f}x",
                    f"{peak / 2**20:.0f}",
                    f"{taken * 1e3:.0f}, {figures['seconds'][first] / taken:.2f}x",
                ]
            )
        header = [group, f"kept for the backward pass, {memory}, MiB", "peak, MiB", f"step, {step}, ms"]
        parts.append(markdown_table(header, rows))
    return "\n\n".join(parts)


def main(
    only: Annotated[str, typer.Option(help="Measure the contestants that have this in their name.")] = "",
    runs: Annotated[int, typer.Option(min=1, help="Timed steps of each.")] = 7,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    step_size: Annotated[tuple[int, int], typer.Option(help="Height and width of images that are timed.")] = STEP_SIZE,
    memory_size: Annotated[tuple[int, int], typer.Option(help="Of those whose memory is measured.")] = MEMORY_SIZE,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    keep_freed: Annotated[
        bool, typer.Option("--keep-freed-memory", help="Call keep_freed_memory first, which speeds up all.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    docs: Annotated[Path | None, typer.Option(help="A page whose section `training` gets the table.")] = None,
    alone_name: Annotated[str, typer.Option("--alone", hidden=True)] = "",
) -> None:
    """Compare training steps of our ResNet-50 with those of its peers."""
    warnings.simplefilter("ignore")  # the peers', about themselves
    torch._dynamo.config.recompile_limit = 1000  # or several compiled nets share eight, and then run uncompiled
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    ways = {name: way for name, way in contestants().items() if only in name}
    if alone_name:
        print(json.dumps(measure_alone(ways[alone_name], memory_size, device)))
        return
    options = ["--memory-size", *map(str, memory_size), "--device", device, "--threads", str(threads)]
    figures: dict[str, Any] = {
        "about": describe_machine(),
        "step size": step_size,
        "memory size": memory_size,
        "memory": {name: alone(name, options) for name in ways},
    }
    if keep_freed:
        keep_freed_memory()
    steps = {
        name: partial(way.step, way.prepare(device), way.images(step_size, device))  # type: ignore[arg-type]
        for name, way in ways.items()
    }
    figures["seconds"] = time_alternating(steps, runs=runs, warmup=2)
    if out is not None:
        out.write_text(json.dumps(figures, indent=1))
    text = table(figures, ways)
    Console(width=200).print(text, markup=False)
    if docs is not None:
        write_section(docs, "training", text)


if __name__ == "__main__":
    typer.run(main)
