"""Write into each config of an architecture what it costs: ``params`` and ``macs``, beside ``source``.

Both are counted with a classifier of 1000 classes, and ``macs`` for one image of 224x224, which are the figures that
papers and libraries publish. Run it after a config was added or changed: ``python tools/record_costs.py``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
import yaml

from resbackbone.analysis.cost import build_on_meta, measure
from resbackbone.cli.console import with_progress
from resbackbone.config import config_files


def main(
    files: Annotated[list[Path] | None, typer.Argument(help="Config files; all of configs/ unless given.")] = None,
    *,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit with 1 if a file is out of date.")] = (
        False
    ),
) -> None:
    """Record parameters and multiply-accumulates in the configs."""
    stale = []
    for path in with_progress(files or list(config_files().values()), "counting"):
        costs = count(path)
        if recorded(path) == costs:
            continue
        if check:
            stale.append(f"{path}: has {recorded(path)}, counted {costs}; run `python tools/record_costs.py`")
        else:
            path.write_text(with_costs(path.read_text(encoding="utf-8"), costs), encoding="utf-8")
    if stale:
        sys.exit("\n".join(stale))


def count(path: Path) -> dict[str, int]:
    """Count what the backbone of a config costs."""
    complexity = measure(build_on_meta(path))
    return {"params": complexity.params_with_classifier, "macs": complexity.macs_with_classifier}


def recorded(path: Path) -> dict[str, int]:
    """Read what a config says that its backbone costs."""
    own = yaml.safe_load(path.read_text(encoding="utf-8"))  # not what a file inherits from its `_base_`
    return {key: own[key] for key in ("params", "macs") if key in own}


def with_costs(text: str, costs: Mapping[str, int]) -> str:
    """Return a config's text with the costs above its ``backbone``, and the rest as it was.

    Raises:
        ValueError: If no line begins with ``backbone:``.
    """
    text = re.sub(rf"^({'|'.join(costs)}):.*\n", "", text, flags=re.MULTILINE)
    lines = "".join(f"{key}: {value}\n" for key, value in costs.items())
    text, found = re.subn(r"^(?=backbone:)", lines, text, count=1, flags=re.MULTILINE)
    if not found:
        raise ValueError("a config that records costs must have a line `backbone:`, above which they go")
    return text


if __name__ == "__main__":
    typer.run(main)
