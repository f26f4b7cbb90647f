"""Benchmarks of a backbone: alternating timings of the plain, optimized and quantized backbone, and the matmul rate."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resbackbone.analysis.cost import measure
from resbackbone.backbones import Backbone
from resbackbone.inference import optimize, quantize
from resbackbone.utils import processor

Call = Callable[[], Any]
PLAIN = "plain"  # the variant that the others are compared with
_PACKAGES = ("torch", "torchvision", "timm", "transformers", "mmdet", "onnxruntime", "openvino")


def time_call(call: Call) -> float:
    """Return the duration of one call in seconds, synchronizing CUDA."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def time_alternating(calls: Mapping[str, Call], *, runs: int, warmup: int = 3) -> dict[str, float]:
    """Time several callables in alternation, so that load on the machine affects all of them equally.

    Args:
        calls: The callables by name.
        runs: Timed calls of each.
        warmup: Untimed calls of each before that.

    Returns:
        The median duration of each in seconds.
    """
    for call in calls.values():
        for _ in range(warmup):
            time_call(call)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            times[name].append(time_call(call))
    return {name: statistics.median(values) for name, values in times.items()}


def matmul_rate(dtype: torch.dtype, *, device: str = "cpu", side: int = 2048) -> float:
    """Return the best rate of a large matrix product, in floating-point operations per second."""
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def multiply() -> Tensor:
        return left @ right

    return 2 * side**3 / min(time_call(multiply) for _ in range(6))


@dataclass(frozen=True)
class Timing:
    """Speed of one variant of a backbone.

    Attributes:
        seconds: Median duration of one batch.
        images_per_second: Throughput.
        speedup: Over the plain backbone, timed in alternation with it.
        flops_per_second: Floating-point operations per second, two for each multiply-accumulate.
        startup_seconds: Duration of the conversion and the first batch.
    """

    seconds: float
    images_per_second: float
    speedup: float
    flops_per_second: float
    startup_seconds: float


def benchmarked_dtypes(device: str) -> list[str]:
    """Return "float32", and "bfloat16" unless the device is a CPU without instructions for it."""
    slow = device == "cpu" and processor.computed_dtype(torch.bfloat16) is not torch.bfloat16
    return ["float32"] if slow else ["float32", "bfloat16"]


def list_variants(device: str, *, compiled: bool = False) -> list[str]:
    """Return the variants that :func:`time_variant` can time on a device, :data:`PLAIN` first.

    Args:
        device: Such as "cpu" or "cuda:1".
        compiled: Whether to include "torch.compile".
    """
    low_precision = "optimize, float16" if device.startswith("cuda") else "quantize, int8"
    variants = [PLAIN, *(f"optimize, {dtype}" for dtype in benchmarked_dtypes(device)), low_precision]
    return [*variants, "torch.compile"] if compiled else variants


@torch.no_grad()
def time_variant(net: Backbone, variant: str, images: Tensor, *, runs: int) -> Timing:
    """Time one variant of a backbone in alternation with the plain backbone.

    Args:
        net: In eval mode, on the device of the images.
        variant: One of :func:`list_variants`.
        images: ``(N, C, H, W)``.
        runs: Timed runs, of which the median counts.
    """
    converted: list[nn.Module] = []
    # Optimized backbones return feature maps in the memory format of the images, and compute in channels_last.
    inputs = images if variant == PLAIN else images.contiguous(memory_format=torch.channels_last)
    startup = time_call(lambda: converted.append(_convert(net, variant, images)))
    startup += time_call(partial(converted[0], inputs))
    calls = {PLAIN: partial(net, images), variant: partial(converted[0], inputs)}
    medians = time_alternating(calls, runs=runs)
    seconds = medians[variant]
    num_images, _, height, width = images.shape
    flops = 2 * num_images * measure(net, size=(height, width)).macs
    return Timing(seconds, num_images / seconds, medians[PLAIN] / seconds, flops / seconds, startup)


def _convert(net: Backbone, variant: str, images: Tensor) -> nn.Module:
    if variant == PLAIN:
        return net
    if variant == "torch.compile":
        return optimize(net, backend="compile")
    if variant == "quantize, int8":
        return quantize(net, [images])
    return optimize(net, variant.removeprefix("optimize, "))  # type: ignore[arg-type]


def describe_machine() -> dict[str, str]:
    """Return the processor, device, number of threads and package versions, to report with benchmark results."""
    facts = {"processor": _processor(), "threads": str(torch.get_num_threads())}
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
    facts["cpu capability"] = torch.backends.cpu.get_cpu_capability()
    facts["Python"] = platform.python_version()
    return facts | {name: found for name in _PACKAGES if (found := _version(name))}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    features = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8") if name in flags]
    return f"{len(models)} x {models[0] if models else platform.machine()} ({', '.join(features)})"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
