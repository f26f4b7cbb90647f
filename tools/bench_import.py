"""Print what `import resbackbone` costs over `import torch`: the median of several fresh interpreters, in seconds."""

import statistics
import subprocess
import sys

RUNS = 7
CODE = "import time, torch; start = time.perf_counter(); import resbackbone; print(time.perf_counter() - start)"


def main() -> None:
    """Run the interpreters and print the median and the range."""
    runs = [
        subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True) for _ in range(RUNS)
    ]
    seconds = sorted(float(run.stdout) for run in runs)
    print(f"import resbackbone over torch: median {statistics.median(seconds):.3f} s of {RUNS} runs,")
    print(f"from {seconds[0]:.3f} to {seconds[-1]:.3f} s; Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
