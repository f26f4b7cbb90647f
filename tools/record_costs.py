"""Write ``configs/costs.yaml``: parameters and multiply-accumulates of the backbone of each config.

Both are counted with a classifier of 1000 classes, and ``macs`` for one image of 224x224, as papers and libraries
publish them. Run it after adding or changing a config: ``python tools/record_costs.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated

import typer

from resbackbone.analysis.cost import build_on_meta, measure
from resbackbone.cli.console import with_progress
from resbackbone.config import BackboneSource, config_files, config_folder

HEADER = (
    "# Written by tools/record_costs.py, not by hand: with a classifier of 1000 classes, for one image of 224x224.\n"
)


def main(
    *,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit with 1 if the file is out of date.")] = (
        False
    ),
) -> None:
    """Record the parameters and multiply-accumulates of all configs."""
    path = config_folder() / "costs.yaml"
    text = dump({name: count(name) for name in with_progress(sorted(config_files()), "counting")})
    if not check:
        path.write_text(text, encoding="utf-8")
    elif path.read_text(encoding="utf-8") != text:
        sys.exit(f"{path.name} is out of date; run `python tools/record_costs.py`")


def count(config: BackboneSource) -> dict[str, int]:
    """Count parameters and multiply-accumulates of the backbone of a config."""
    complexity = measure(build_on_meta(config))
    return {"params": complexity.params_with_classifier, "macs": complexity.macs_with_classifier}


def dump(costs: Mapping[str, Mapping[str, int]]) -> str:
    """Return the text of the file: one line per config, sorted by name."""
    lines = (f"{name}: {{params: {cost['params']}, macs: {cost['macs']}}}\n" for name, cost in sorted(costs.items()))
    return HEADER + "".join(lines)


if __name__ == "__main__":
    typer.run(main)
