"""``resbackbone list``: the architectures, by family."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from resbackbone.cli.console import results, user_errors


def list_backbones(
    pattern: Annotated[
        str, typer.Argument(help="Part of the name, or the whole with * and ? as in a shell.", show_default=False)
    ] = "*",
    *,
    names: Annotated[bool, typer.Option("--names", help="Only the names, one per line.")] = False,
) -> None:
    """List the architectures that `info` and `extract` know by name, with what each costs."""
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
        _print_table(found)


def _print_table(names: list[str]) -> None:
    from rich import box
    from rich.table import Table

    from resbackbone.config import config_files

    names = sorted(names, key=lambda name: (config_files()[name].parent.name, _natural(name)))
    table = Table(
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
        caption="params and MACs with a classifier of 1000 classes, for one image of 224x224",
    )
    for heading in ("family", "name", "type"):
        table.add_column(heading, no_wrap=True)
    for heading in ("params", "MACs"):
        table.add_column(heading, no_wrap=True, justify="right")
    above = ""
    for name in names:
        family = config_files()[name].parent.name
        if above and family != above:
            table.add_section()
        table.add_row("" if family == above else family, name, *_facts(name))
        above = family
    results.print(table)


def _natural(name: str) -> list[str | int]:
    """Sort key by which resnet18 comes before resnet101."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _facts(name: str) -> tuple[str, str, str]:
    """Type of a backbone, and the parameters and multiply-accumulates that its file records."""
    from resbackbone.config import load_config

    config = load_config(name)
    params, macs = config.about.get("params"), config.about.get("macs")
    return str(config.backbone["type"]), _rounded(params, 1e6, "{:.1f} M"), _rounded(macs, 1e9, "{:.2f} G")


def _rounded(count: int | None, unit: float, form: str) -> str:
    """Write a count in a larger unit, or nothing where none is recorded."""
    return "" if count is None else form.format(count / unit)
