"""Print the import time of resbackbone over that of torch, and the CPU time of ``resbackbone --help``, in seconds.

Each figure is the median of several fresh interpreters.
"""

import statistics
import subprocess
import sys

RUNS = 7
IMPORT = "import time, torch; t = time.perf_counter(); from resbackbone import ResNet; print(time.perf_counter() - t)"
HELP = """
import contextlib, io, time
from resbackbone.cli import app
with contextlib.redirect_stdout(io.StringIO()):
    app(["--help"], standalone_mode=False)
print(time.process_time())
"""


def measure(code: str) -> list[float]:
    """Run code that prints a number in fresh interpreters; return the numbers, sorted."""
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(RUNS)]
    return sorted(float(run.stdout) for run in runs)


def main() -> None:
    """Run the interpreters and print medians and ranges."""
    for what, code in {"from resbackbone import ResNet, over torch": IMPORT, "CPU of resbackbone --help": HELP}.items():
        seconds = measure(code)
        print(f"{what}: median {statistics.median(seconds):.3f} s of {RUNS} runs,")
        print(f"from {seconds[0]:.3f} to {seconds[-1]:.3f} s; Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
