"""What the benchmark tools share: peak memory, and Markdown tables in the pages of docs/."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch


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
