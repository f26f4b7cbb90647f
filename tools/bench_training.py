"""Benchmark training steps of ResNet-50 against the same network in other libraries, with their optimizations.

All networks run alternately in one process on the same images, and medians are compared. They train like detectors,
with the stem, the first stage and all statistics frozen; a second group has batch norms in train mode. A step is a
forward and a backward pass, without the optimizer. mmdet is included if it is installed.
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
class Candidate:
    """A network and how it is trained.

    Attributes:
        make: Builds the network.
        group: Candidates of the same group are compared.
        channels_last: Whether weights and images are in channels_last.
        dtype: Data type of autocast; None disables it.
        compiled: Whether the network is compiled by torch.compile.
    """

    make: Callable[[], Any]
    group: str = FROZEN
    channels_last: bool = False
    dtype: torch.dtype | None = None
    compiled: bool = False

    def prepare(self, device: str) -> Callable[[Tensor], Any]:
        """Build the network, compiled if requested."""
        net = self.make().to(device=device, memory_format=self.memory_format)
        return torch.compile(net) if self.compiled else net

    @property
    def memory_format(self) -> torch.memory_format:
        """Memory format of weights and images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def images(self, size: tuple[int, int], device: str) -> Tensor:
        """Return random images."""
        return torch.randn(BATCH, 3, *size, device=device).contiguous(memory_format=self.memory_format)

    def forward(self, net: Callable[[Tensor], Any], images: Tensor) -> list[Tensor]:
        """Return the feature maps."""
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype is not None):
            outs = net(images)
        return list(outs.values()) if isinstance(outs, dict) else list(outs)

    def step(self, net: nn.Module, images: Tensor) -> None:
        """Run a forward pass, and a backward pass from given output gradients."""
        net.zero_grad()
        outs = [out for out in self.forward(net, images) if out.requires_grad]
        torch.autograd.backward(outs, [out.detach() for out in outs])


def freeze_as_detectors(make: Callable[[], Any]) -> Any:
    """Build a network of another library, frozen as by ``frozen_stages=1`` and ``norm_eval=True``."""
    net = make().eval()  # only norms depend on the mode
    for name in ("conv1", "bn1", "layer1"):
        net.get_submodule(name).requires_grad_(False)
    return net


def mmdet_training(**options: Any) -> Any:
    """Return mmdet's network in train mode; by default the stem and the first stage are frozen."""
    net: Any = mmdet_net(**{"frozen_stages": 1, **options})
    net.train()
    return net


def mmdet_efficient() -> Any:
    """Return it with mmengine's fused convolutions and eval-mode norms."""
    from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval_for_single_model

    net = mmdet_training()
    turn_on_efficient_conv_bn_eval_for_single_model(net)
    return net


def ours(**options: Any) -> Any:
    """Return our network in train mode."""
    return build_backbone("resnet50", **options).train()


def build_candidates() -> dict[str, Candidate]:
    """Return all candidates of installed libraries; the first of each group is the reference of ratios."""
    bf16 = torch.bfloat16
    folded = partial(ours, frozen_stages=1, fold_frozen_norms=True)
    plain = partial(ours, frozen_stages=1)
    theirs: dict[str, Callable[[], Any]] = {
        name: partial(freeze_as_detectors, make) for name, make in _installed_peers().items()
    }
    if find_spec("mmdet"):
        theirs = {"mmdet": mmdet_training, **theirs}
    candidates = {}
    for name, make in theirs.items():
        candidates[name] = Candidate(make)
        candidates[f"{name}, channels_last"] = Candidate(make, channels_last=True)
    reference = next(iter(theirs), "resbackbone")
    if "mmdet" in theirs:
        candidates["mmdet, efficient_conv_bn_eval"] = Candidate(mmdet_efficient)
        candidates["mmdet, efficient_conv_bn_eval, channels_last"] = Candidate(mmdet_efficient, channels_last=True)
    compiling = theirs.get(reference, plain)
    candidates |= {
        f"{reference}, torch.compile, channels_last": Candidate(compiling, channels_last=True, compiled=True),
        "resbackbone": Candidate(plain),
        "resbackbone, channels_last": Candidate(plain, channels_last=True),
        "resbackbone, fold_frozen_norms": Candidate(folded),
        "resbackbone, fold_frozen_norms, channels_last": Candidate(folded, channels_last=True),
        "resbackbone, fold_frozen_norms, torch.compile, channels_last": Candidate(
            folded, channels_last=True, compiled=True
        ),
        f"{reference}, autocast": Candidate(compiling, dtype=bf16),
        f"{reference}, autocast, channels_last": Candidate(compiling, channels_last=True, dtype=bf16),
        "resbackbone, autocast, fold_frozen_norms": Candidate(folded, dtype=bf16),
        "resbackbone, autocast, fold_frozen_norms, channels_last": Candidate(folded, channels_last=True, dtype=bf16),
    }
    trained = partial(ours, norm_eval=False)
    candidates |= {
        "resbackbone, trained norms": Candidate(trained, TRAINED),
        'resbackbone, trained norms, with_cp="norms"': Candidate(partial(trained, with_cp="norms"), TRAINED),
        "resbackbone, trained norms, with_cp=True": Candidate(partial(trained, with_cp=True), TRAINED),
    }
    if "mmdet" in theirs:
        mmdet_trained = partial(mmdet_training, norm_eval=False, frozen_stages=-1)
        candidates["mmdet, trained norms"] = Candidate(mmdet_trained, TRAINED)
        candidates["mmdet, trained norms, with_cp=True"] = Candidate(partial(mmdet_trained, with_cp=True), TRAINED)
    return candidates


def _installed_peers() -> dict[str, Callable[[], Any]]:
    peers = {"torchvision": torchvision_net, "timm": timm_net}
    return {name: make for name, make in peers.items() if find_spec(name)}


def saved_bytes(candidate: Candidate, net: Callable[[Tensor], Any], images: Tensor) -> int:
    """Return the memory that a forward pass keeps for the backward pass, including the outputs."""
    candidate.step(net, images)  # type: ignore[arg-type]  # compiles, and allocates persistent buffers
    gc.collect()
    if images.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        outs = candidate.forward(net, images)
        kept = torch.cuda.memory_allocated() - before
        del outs  # after the measurement
        return kept
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        outs = candidate.forward(net, images)
    del outs  # after the measurement
    return sum(event.self_cpu_memory_usage for event in events.key_averages())


def measure_memory(candidate: Candidate, size: tuple[int, int], device: str) -> dict[str, float]:
    """Measure saved and peak memory of training steps, in a fresh process."""
    net, images = candidate.prepare(device), candidate.images(size, device)
    before = peak_memory(device)
    for _ in range(2):
        candidate.step(net, images)  # type: ignore[arg-type]
    after = peak_memory(device)
    return {"kept": saved_bytes(candidate, net, images), "peak": after - before}


def measure_in_subprocess(name: str, options: list[str]) -> dict[str, float]:
    """Run :func:`measure_memory` in a subprocess."""
    run = subprocess.run(
        [sys.executable, __file__, "--memory-of", name, *options], stdout=subprocess.PIPE, text=True, check=True
    )
    results: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return results


def table(results: dict[str, Any], candidates: dict[str, Candidate]) -> str:
    """Format the results as Markdown."""
    about = ", ".join(f"{key} {value}" for key, value in results["about"].items())
    memory, step = ("x".join(map(str, results[key])) for key in ("memory size", "step size"))
    parts = [f"resnet50, batch {BATCH}; {about}."]
    for group in (FROZEN, TRAINED):
        names = [name for name, candidate in candidates.items() if candidate.group == group]
        first = names[0]
        rows = []
        for name in names:
            kept, peak = (results["memory"][name][key] for key in ("kept", "peak"))
            taken = results["seconds"][name]
            rows.append(
                [
                    name,
                    f"{kept / 2**20:.0f}, {kept / results['memory'][first]['kept']:.2f}x",
                    f"{peak / 2**20:.0f}",
                    f"{taken * 1e3:.0f}, {results['seconds'][first] / taken:.2f}x",
                ]
            )
        header = [group, f"kept for the backward pass, {memory}, MiB", "peak, MiB", f"step, {step}, ms"]
        parts.append(markdown_table(header, rows))
    return "\n\n".join(parts)


def main(
    only: Annotated[str, typer.Option(help="Benchmark only candidates with this in their name.")] = "",
    runs: Annotated[int, typer.Option(min=1, help="Number of timed steps of each candidate.")] = 7,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    step_size: Annotated[tuple[int, int], typer.Option(help="Height and width of images for timing.")] = STEP_SIZE,
    memory_size: Annotated[tuple[int, int], typer.Option(help="Height and width of images for memory.")] = MEMORY_SIZE,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    keep_freed: Annotated[
        bool, typer.Option("--keep-freed-memory", help="Call keep_freed_memory first, which speeds up all candidates.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
    docs: Annotated[Path | None, typer.Option(help="Page with a section `training` for the table.")] = None,
    subprocess_candidate: Annotated[str, typer.Option("--memory-of", hidden=True)] = "",
) -> None:
    """Benchmark training steps of our ResNet-50 against other libraries."""
    warnings.simplefilter("ignore")  # of other libraries
    torch._dynamo.config.recompile_limit = 1000  # compiled networks share this limit, 8 by default
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    candidates = {name: candidate for name, candidate in build_candidates().items() if only in name}
    if subprocess_candidate:
        print(json.dumps(measure_memory(candidates[subprocess_candidate], memory_size, device)))
        return
    options = ["--memory-size", *map(str, memory_size), "--device", device, "--threads", str(threads)]
    results: dict[str, Any] = {
        "about": describe_machine(),
        "step size": step_size,
        "memory size": memory_size,
        "memory": {name: measure_in_subprocess(name, options) for name in candidates},
    }
    if keep_freed:
        keep_freed_memory()
    steps = {
        name: partial(candidate.step, candidate.prepare(device), candidate.images(step_size, device))  # type: ignore[arg-type]
        for name, candidate in candidates.items()
    }
    results["seconds"] = time_alternating(steps, runs=runs, warmup=2)
    if out is not None:
        out.write_text(json.dumps(results, indent=1))
    text = table(results, candidates)
    Console(width=200).print(text, markup=False)
    if docs is not None:
        write_section(docs, "training", text)


if __name__ == "__main__":
    typer.run(main)
