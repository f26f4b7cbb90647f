"""``resbackbone list``: the architectures, by family."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from resbackbone.cli.console import results, user_errors, with_progress


def list_backbones(
    pattern: Annotated[
        str, typer.Argument(help="Part of the name, or the whole with * and ? as in a shell.", show_default=False)
    ] = "*",
    *,
    names: Annotated[bool, typer.Option("--names", help="Only the names, one per line.")] = False,
    long: Annotated[
        bool, typer.Option("--long", help="Parameters and multiply-accumulates, too; takes a while.")
    ] = False,
) -> None:
    """List the architectures that `info` and `extract` know by name."""
    import resbackbone
    from resbackbone.checks import nearest

    with user_errors():
        wildcard = any(sign in pattern for sign in "*?[")
        found = resbackbone.list_backbones(pattern if wildcard else f"*{pattern}*")
        if not found:
            hint = nearest(pattern, resbackbone.list_backbones(), list_all="`resbackbone list` shows all")
            raise ValueError(f"no backbone's name matches {pattern!r}{hint}")
    if names:
        typer.echo("\n".join(found))
    else:
        _print_table(found, long=long)


def _print_table(names: list[str], *, long: bool) -> None:
    from rich import box
    from rich.table import Table

    from resbackbone.config import config_files

    names = sorted(names, key=lambda name: (config_files()[name].parent.name, _natural(name)))
    table = Table(box=box.SIMPLE, caption="without a classifier, MACs at 224x224" if long else None)
    for heading in ("family", "name", "type"):
        table.add_column(heading, no_wrap=True)
    for heading in ("depth", "params", "MACs") if long else ("depth",):
        table.add_column(heading, no_wrap=True, justify="right")
    above = ""
    for name in with_progress(names, "counting"):
        family = config_files()[name].parent.name
        if above and family != above:
            table.add_section()
        table.add_row("" if family == above else family, name, *_facts(name, long=long))
        above = family
    results.print(table)


def _natural(name: str) -> list[str | int]:
    """Sort key by which resnet18 comes before resnet101."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _facts(name: str, *, long: bool) -> list[str]:
    """Type and depth of a backbone; parameters and multiply-accumulates, for which it has to be built."""
    from resbackbone.complexity import build_on_meta, measure
    from resbackbone.config import load_config

    config = load_config(name).backbone
    facts = [str(config["type"]), str(config.get("depth", ""))]
    if long:
        complexity = measure(build_on_meta(config))
        facts += [f"{complexity.params / 1e6:.2f} M", f"{complexity.macs / 1e9:.2f} G"]
    return facts
