"""Benchmark the inference of a backbone, plain and optimized, against other libraries and runtimes.

All nets run alternately in one process, on the same images; medians are compared. The feature maps of all four stages
are computed. ``python tools/bench_inference.py --peers torchvision,timm --docs docs/benchmarks.md``; mmdet needs an
environment of its own.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import torch._dynamo
import typer
from bench_report import markdown_table, peak_memory, write_section
from peers import PEERS, Net
from rich.console import Console
from torch import Tensor

from resbackbone import build_backbone
from resbackbone.analysis.benchmark import describe_machine, matmul_rate, time_alternating, time_call
from resbackbone.analysis.cost import build_on_meta, measure
from resbackbone.inference import export, optimize, quantize
from resbackbone.utils import processor
from resbackbone.utils.allocator import keep_freed_memory

EAGER, OURS = "torch eager", "resbackbone"
SHAPES = {"1x224x224": (1, 224, 224), "8x224x224": (8, 224, 224), "1x800x1216": (1, 800, 1216)}
FAMILIES = (
    "resnet18",
    "resnet101",
    "resnext101_32x4d",
    "resnet50_v1d",
    "regnetx_3.2gf",
    "res2net50_26w_4s",
    "resnest50",
)


@dataclass(frozen=True)
class Candidate:
    """A net of ours, another library or another runtime to benchmark.

    Attributes:
        build: Builds it.
        dtype: Dtype of the computation.
        device: The device that it is for, "cpu" or "cuda"; empty for any.
    """

    build: Callable[[], Net]
    dtype: str = "float32"
    device: str = ""


def channels_last(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return images in channels_last."""
    return x.to(dtype, memory_format=torch.channels_last)


def with_channels_last_input(build: Callable[[], Net]) -> Net:
    """Build one of our nets, called with images in channels_last, so that its outputs are not converted."""
    net = build()
    return lambda x: net(channels_last(x))


def compiled_net(dtype: torch.dtype = torch.float32, *, device: str = "cpu", freezing: bool = False) -> Net:
    """Return our net through torch.compile, in channels_last; with freezing, Inductor folds norms and packs weights."""
    import torch._inductor.config

    net = build_backbone("resnet50").eval().to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    compiled: Callable[[Tensor], Any] = torch.compile(net, dynamic=False if freezing else None)

    def call(x: Tensor) -> Any:
        # Without the caches of earlier runs on disk, to measure a first compilation.
        with torch._inductor.config.patch(freezing=freezing, force_disable_caches=True):
            return compiled(channels_last(x, dtype))

    return call


def onnx_file(folder: Path) -> Path:
    """Return the exported net, exported once."""
    path = folder / "resnet50.onnx"
    if not path.exists():
        export(build_backbone("resnet50").eval(), path, "onnx")
    return path


def quantized_onnx_file(folder: Path) -> Path:
    """Return the exported net in int8, quantized once by ONNX Runtime with one scale per output channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path, prepared = folder / "resnet50_int8.onnx", folder / "resnet50_prepared.onnx"
    if path.exists():
        return path

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # it ships no types
        def __init__(self) -> None:
            self.images: Iterator[Any] = iter([{"images": torch.randn(1, 3, 224, 224).numpy()} for _ in range(4)])

        def get_next(self) -> Any:
            return next(self.images, None)

    quant_pre_process(onnx_file(folder), prepared)
    quantize_static(
        prepared,
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return path


def onnxruntime_net(folder: Path, *, int8: bool = False) -> Net:
    """Return the exported net in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    file = quantized_onnx_file(folder) if int8 else onnx_file(folder)
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"images": x.numpy()})


def openvino_net(folder: Path, precision: str = "f32", *, int8: bool = False) -> Net:
    """Return the exported net in OpenVINO."""
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    file = quantized_onnx_file(folder) if int8 else onnx_file(folder)
    model = openvino.Core().compile_model(str(file), "CPU", settings)
    request = model.create_infer_request()
    return lambda x: request.infer([x.numpy()])


def all_candidates(config: str, folder: Path, device: str) -> dict[str, Candidate]:
    """Return all candidates for a device by name; speedups are relative to the first."""
    net = build_backbone(config).eval().to(device)
    bf16 = torch.bfloat16

    def on_device(build: Callable[[], Any]) -> Net:
        return build().to(device)  # type: ignore[no-any-return]

    def ours(build: Callable[..., Net], *args: Any, **options: Any) -> Callable[[], Net]:
        return partial(with_channels_last_input, partial(build, *args, **options))

    candidates = {
        EAGER: Candidate(lambda: net),
        f"{OURS} eager": Candidate(ours(optimize, net, backend="eager")),
        OURS: Candidate(ours(optimize, net)),
        f"{OURS} bfloat16": Candidate(ours(optimize, net, "bfloat16"), "bfloat16"),
        f"{OURS} float16": Candidate(ours(optimize, net, "float16"), "float16", "cuda"),
        f"{OURS} int8": Candidate(ours(quantize, net, [torch.randn(2, 3, 224, 224)]), "int8", "cpu"),
        **{name: Candidate(partial(on_device, build)) for name, build in PEERS.items()},
        "torch.compile": Candidate(partial(compiled_net, device=device)),
        "torch.compile bfloat16": Candidate(partial(compiled_net, bf16, device=device), "bfloat16", "cuda"),
        "Inductor freezing": Candidate(partial(compiled_net, freezing=True), device="cpu"),
        "ONNX Runtime": Candidate(partial(onnxruntime_net, folder), device="cpu"),
        "OpenVINO": Candidate(partial(openvino_net, folder), device="cpu"),
        "Inductor freezing bfloat16": Candidate(partial(compiled_net, bf16, freezing=True), "bfloat16", "cpu"),
        "OpenVINO bfloat16": Candidate(partial(openvino_net, folder, "bf16"), "bfloat16", "cpu"),
        "ONNX Runtime int8": Candidate(partial(onnxruntime_net, folder, int8=True), "int8", "cpu"),
        "OpenVINO int8": Candidate(partial(openvino_net, folder, int8=True), "int8", "cpu"),
    }
    return {name: candidate for name, candidate in candidates.items() if candidate.device in ("", device)}


def varying_sizes(count: int = 60) -> list[tuple[int, int]]:
    """Return distinct image sizes as in COCO detection: the shorter side 480 to 800, the longer up to 1333 pixels."""
    rng = random.Random(0)
    sizes: dict[tuple[int, int], None] = {}
    while len(sizes) < count:
        shorter = rng.randrange(480, 801, 16)
        ratio = rng.choice([4 / 3] * 5 + [3 / 2] * 3 + [1.0, 16 / 9])  # most pictures of COCO are 640 x 480
        sides = (shorter, min(round(shorter * ratio / 32) * 32, 1333 // 32 * 32))
        sizes[sides if rng.random() < 0.75 else sides[::-1]] = None
    return list(sizes)


@torch.no_grad()
def latency(nets: dict[str, Net], runs: int, device: str) -> dict[str, dict[str, float]]:
    """Return seconds by shape and candidate."""
    times = {}
    for shape, (batch, *size) in SHAPES.items():
        x = torch.randn(batch, 3, *size, device=device)
        times[shape] = time_alternating({name: partial(net, x) for name, net in nets.items()}, runs=runs)
    return times


@torch.no_grad()
def stream(nets: dict[str, Net], device: str) -> dict[str, float]:
    """Return the seconds of each candidate for a stream of images, each of a size not seen before."""
    torch._dynamo.reset()  # or code compiled for another copy of the net is reused
    totals = dict.fromkeys(nets, 0.0)
    for size in varying_sizes():
        x = torch.randn(1, 3, *size, device=device)
        for name, net in nets.items():
            totals[name] += time_call(partial(net, x))
    return totals


@torch.no_grad()
def scaling(nets: dict[str, Net], threads: int, runs: int, device: str) -> dict[str, dict[str, float]]:
    """Return images per second at 224x224, by number of threads and batch size."""
    rates: dict[str, dict[str, float]] = {}
    for count in sorted({1, threads}) if device == "cpu" else [threads]:
        torch.set_num_threads(count)
        for batch in (1, 2, 4, 8, 16):
            x = torch.randn(batch, 3, 224, 224, device=device)
            times = time_alternating({name: partial(net, x) for name, net in nets.items()}, runs=runs)
            rates[f"{count} threads, batch {batch}"] = {name: batch / time for name, time in times.items()}
    torch.set_num_threads(threads)
    return rates


@torch.no_grad()
def families(runs: int, device: str) -> dict[str, dict[str, float]]:
    """Return seconds of other architectures, plain and optimized, at 1x224x224 and 1x480x640."""
    results = {}
    for config in FAMILIES:
        net = build_backbone(config).eval().to(device)
        nets: dict[str, Any] = {EAGER: net, OURS: with_channels_last_input(partial(optimize, net))}
        nets[f"{OURS} bfloat16"] = with_channels_last_input(partial(optimize, net, "bfloat16"))
        for size in ((224, 224), (480, 640)):
            x = torch.randn(1, 3, *size, device=device)
            times = time_alternating({name: partial(net, x) for name, net in nets.items()}, runs=runs)
            results[f"{config} {size[0]}x{size[1]}"] = times
    return results


def alone(config: str, name: str, threads: int, folder: Path, device: str) -> dict[str, float]:
    """Measure start-up and memory of one candidate in its own process."""
    options = ["--config", config, "--alone", name, "--threads", str(threads), "--folder", str(folder)]
    command = [sys.executable, __file__, *options, "--device", device]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    results: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return results


@torch.no_grad()
def measure_alone(candidate: Candidate, device: str) -> dict[str, float]:
    """Measure the time to a candidate's first output, and its peak memory for an image of a detector's size."""
    x = torch.randn(1, 3, 224, 224, device=device)
    before = peak_memory(device)
    nets: list[Net] = []
    first = time_call(lambda: nets.append(candidate.build())) + time_call(lambda: nets[0](x))
    for _ in range(3):
        nets[0](torch.randn(1, 3, 800, 1216, device=device))
    return {"start-up, s": first, "memory, MiB": (peak_memory(device) - before) / 2**20}


def table(config: str, results: dict[str, Any], candidates: dict[str, Candidate]) -> str:
    """Return the results of one run as Markdown."""
    macs = measure(build_on_meta(config), size=(800, 1216)).macs
    columns = dict(results["seconds"])
    if results.get("stream"):
        columns["60 sizes"] = results["stream"]
    header = ["path", *columns, "of matmul rate, 1x800x1216"]
    if results.get("alone"):
        header += ["start-up, s", "memory, MiB"]
    rows = []
    for name in results["seconds"]["1x224x224"]:
        cells = [name]
        for times in columns.values():
            cells.append(f"{times[name] * 1e3:.1f}, {times[EAGER] / times[name]:.2f}x" if name in times else "-")
        rate = results["matmul"].get(candidates[name].dtype)
        cells.append(f"{2 * macs / results['seconds']['1x800x1216'][name] / rate:.2f}" if rate else "-")
        if results.get("alone"):
            own = results["alone"].get(name, {})
            cells += [f"{own['start-up, s']:.2f}", f"{own['memory, MiB']:.0f}"] if own else ["-", "-"]
        rows.append(cells)
    about = ", ".join(f"{key} {value}" for key, value in results["about"].items())
    rates = ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in results["matmul"].items())
    parts = [f"{config}; {about}. Matrix products: {rates}.", markdown_table(header, rows)]
    for title in ("scaling", "families"):
        if results.get(title):
            parts.append(other_table(title, results[title]))
    return "\n\n".join(parts)


def other_table(title: str, results: dict[str, dict[str, float]]) -> str:
    """Return the results of `scaling` or `families` as Markdown."""
    names = list(next(iter(results.values())))
    if title == "scaling":
        rows = [[where, *(f"{rates[name]:.1f}" for name in names)] for where, rates in results.items()]
        return markdown_table(["images/s, 224x224", *names], rows)
    rows = [
        [where, *(f"{times[name] * 1e3:.1f}, {times[EAGER] / times[name]:.2f}x" for name in names)]
        for where, times in results.items()
    ]
    return markdown_table(["architecture", *names], rows)


def main(
    config: Annotated[str, typer.Option(help="Our architecture; peers are always ResNet-50.")] = "resnet50",
    peers: Annotated[
        str, typer.Option(help="Comma-separated names of other libraries and runtimes, or 'all'.")
    ] = "all",
    runs: Annotated[int, typer.Option(min=1, help="Number of timed runs.")] = 9,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    parts: Annotated[
        str, typer.Option(help="What to measure besides latency: any of stream, alone, scaling, families.")
    ] = "stream,alone,scaling,families",
    out: Annotated[Path | None, typer.Option(help="Write the results to a JSON file.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    keep_freed: Annotated[
        bool, typer.Option("--keep-freed-memory", help="Call keep_freed_memory first, which speeds up all candidates.")
    ] = False,
    docs: Annotated[Path | None, typer.Option(help="Page to write the table to, into its section `inference`.")] = None,
    alone_name: Annotated[str, typer.Option("--alone", hidden=True)] = "",
    folder: Annotated[Path | None, typer.Option(help="Folder to read exported files from, or to keep them in.")] = None,
) -> None:
    """Benchmark the inference of a backbone against its peers."""
    warnings.simplefilter("ignore")  # warnings of the peers
    torch._dynamo.config.recompile_limit = 1000  # or all compiled nets share a limit of 8, and then run eagerly
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if keep_freed:
        keep_freed_memory()
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        candidates = all_candidates(config, folder, device)
        if alone_name:
            print(json.dumps(measure_alone(candidates[alone_name], device)))
            return
        for results in run_all(config, _select(candidates, peers), parts.split(","), runs, threads, folder, device):
            if out is not None:
                out.write_text(json.dumps({"config": config, **results}, indent=1))
    text = table(config, results, candidates)
    Console(width=200).print(text, markup=False)
    if docs is not None:
        write_section(docs, "inference", text)


def run_all(
    config: str, candidates: dict[str, Candidate], parts: list[str], runs: int, threads: int, folder: Path, device: str
) -> Iterator[dict[str, Any]]:
    """Measure latency and the given parts; yield the results so far after each."""
    nets = {name: candidate.build() for name, candidate in candidates.items()}
    results: dict[str, Any] = {
        "about": describe_machine(),
        "matmul": {
            name: matmul_rate(getattr(torch, name), device=device)
            for name in ("float32", "bfloat16")
            if device != "cpu" or processor.computes_natively(getattr(torch, name))
        },
        "seconds": latency(nets, runs, device),
    }
    yield results
    few = [name for name in (EAGER, OURS, f"{OURS} bfloat16", "torch.compile") if name in candidates]
    measures: dict[str, Callable[[], Any]] = {
        "stream": lambda: stream({name: candidates[name].build() for name in few}, device),
        "alone": lambda: {
            name: alone(config, name, threads, folder, device) for name in candidates if name not in PEERS
        },
        "families": lambda: families(runs, device),
        "scaling": lambda: scaling({name: nets[name] for name in few[:3]}, threads, runs, device),
    }
    for part in parts:
        if part:
            results[part] = measures[part]()
            yield results


def _select(candidates: dict[str, Candidate], peers: str) -> dict[str, Candidate]:
    names = [name for name in peers.split(",") if name]
    if peers == "all":
        names = [name for name in candidates if name not in PEERS or find_spec(name)]
    if unknown := set(names) - set(candidates):
        raise typer.BadParameter(f"unknown peer {min(unknown)!r}; known: {', '.join(candidates)}", param_hint="--peers")
    return {name: item for name, item in candidates.items() if name in names or name.startswith((EAGER, OURS))}


if __name__ == "__main__":
    typer.run(main)
