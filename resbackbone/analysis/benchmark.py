"""Benchmarking utilities: alternating timings, matmul rate, peak memory, and Markdown tables of results."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]
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


def peak_memory(device: str = "cpu") -> int:
    """Return the peak memory of this process in bytes, on the CPU or on the CUDA device."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved()
    try:  # `getrusage` includes the memory of the parent process
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def describe_machine() -> dict[str, str]:
    """Return the processor, device, number of threads and package versions, to report with benchmark results."""
    facts = {"processor": _processor(), "threads": str(torch.get_num_threads())}
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
    facts["cpu capability"] = torch.backends.cpu.get_cpu_capability()
    facts["Python"] = platform.python_version()
    return facts | {name: found for name in _PACKAGES if (found := _version(name))}


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_section(page: str | Path, name: str, text: str) -> None:
    """Replace the text between ``<!-- NAME -->`` and ``<!-- end of NAME -->`` in a file.

    Raises:
        ValueError: If the file has no such section.
    """
    path = Path(page)
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, found, rest = path.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{path} has no section {begin} ... {end} to write the table to")
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


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
