"""Measuring contestants beside each other: in one process, in turn, by medians."""

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


def seconds(call: Call) -> float:
    """Time one call; on a CUDA device until its work is done."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(calls: Mapping[str, Call], *, runs: int, warmup: int = 3) -> dict[str, float]:
    """Time contestants in turn, so that what disturbs the machine disturbs all.

    Args:
        calls: What is timed, by name.
        runs: How often each.
        warmup: How often each is called before.

    Returns:
        The median of each, in seconds.
    """
    for call in calls.values():
        for _ in range(warmup):
            seconds(call)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return {name: statistics.median(values) for name, values in times.items()}


def matmul_rate(dtype: torch.dtype, *, device: str = "cpu", side: int = 2048) -> float:
    """Measure what the machine can do: floating-point operations per second of one large matrix product, at best."""
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def multiply() -> Tensor:
        return left @ right

    return 2 * side**3 / min(seconds(multiply) for _ in range(6))


def peak_memory(device: str = "cpu") -> int:
    """Return the most bytes that this process has taken so far, from the system or on the CUDA device."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved()
    try:  # `getrusage` would begin with what the parent process had
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def about_machine() -> dict[str, str]:
    """Say what figures were measured on: processor, devices, threads and versions."""
    facts = {"processor": _processor(), "threads": str(torch.get_num_threads())}
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
    facts["cpu capability"] = torch.backends.cpu.get_cpu_capability()
    facts["Python"] = platform.python_version()
    return facts | {name: found for name in _PACKAGES if (found := _version(name))}


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_section(page: str | Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- NAME -->`` and ``<!-- end of NAME -->`` in a page.

    Raises:
        ValueError: If the page has no such section.
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
