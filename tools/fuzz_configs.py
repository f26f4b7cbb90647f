"""Draw whole configs at random and see that each is built and runs, or is refused naming the argument.

``python tools/fuzz_configs.py --count 5000``; the exit status is 1 where something else happened. A line of each such
finding begins with its seed, which ``--seed SEED --count 1`` tries again.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

sys.path.append(str(Path(__file__).parent.parent / "tests" / "support"))  # where the tests share the draws with this

from config_contract import Outcome, try_config
from random_configs import draw


def _try(seed: int) -> Outcome:
    torch.set_num_threads(1)
    return try_config(draw(seed))


def main(
    count: Annotated[int, typer.Option(min=1, help="How many configs.")] = 5000,
    seed: Annotated[int, typer.Option(help="The first one's seed; the others' follow.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, one thread each.")] = 1,
) -> None:
    """Draw configs and try each."""
    console = Console(stderr=True)
    started = time.perf_counter()
    seeds = range(seed, seed + count)
    if jobs == 1:
        outcomes = [_try(one) for one in track(seeds, console=console, description="configs")]
    else:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            run = pool.map(_try, seeds, chunksize=10)
            outcomes = list(track(run, console=console, description="configs", total=count))
    findings = [(one, outcome.finding) for one, outcome in zip(seeds, outcomes, strict=True) if outcome.finding]
    for one, finding in findings:
        print(f"{one}: {finding}")
    if count == 1:
        print(draw(seed))
    totals = Counter("built" if outcome.built else "refused" for outcome in outcomes)
    print(
        f"{count} configs: {totals['built']} built, {totals['refused']} refused, {len(findings)} findings; "
        f"{time.perf_counter() - started:.0f} s, torch {torch.__version__}"
    )
    sys.exit(bool(findings))


if __name__ == "__main__":
    typer.run(main)
