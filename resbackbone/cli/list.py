"""``resbackbone list``: architectures by family, and published weights."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated

import typer

from resbackbone.cli.console import stdout, user_errors

if TYPE_CHECKING:
    from rich.table import Table


def list_backbones(
    pattern: Annotated[
        str, typer.Argument(help="Part of the name, or a shell pattern with * and ?.", show_default=False)
    ] = "*",
    *,
    names: Annotated[bool, typer.Option("--names", help="Print only the names, one per line.")] = False,
    weights: Annotated[bool, typer.Option("--weights", help="List published weights instead.")] = False,
) -> None:
    """List the architectures by name, with their parameters and multiply-accumulates; or published weights."""
    import resbackbone
    from resbackbone.checkpoints import list_weights

    with user_errors():
        if weights:
            known = [one.name for one in list_weights()]
            found = _matching(pattern, known, "weights match", "resbackbone list --weights")
        else:
            found = _matching(pattern, resbackbone.list_backbones(), "backbone matches", "resbackbone list")
    if names:
        typer.echo("\n".join(found))
    elif weights:
        _print_weights(found)
    else:
        _print_backbones(found)


def _matching(pattern: str, names: Collection[str], what: str, command: str) -> list[str]:
    """Return the names that match a pattern; without wildcards, those that contain it."""
    from resbackbone.utils.validation import nearest

    wildcard = any(sign in pattern for sign in "*?[")
    found = sorted(fnmatch.filter(names, pattern if wildcard else f"*{pattern}*"))
    if not found:
        hint = nearest(pattern, names, list_all=f"`{command}` shows all", same_numbers=True)
        raise ValueError(f"no {what} {pattern!r}{hint}")
    return found


def _table(texts: Collection[str], numbers: Collection[str], caption: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), caption=caption)
    for heading in texts:
        table.add_column(heading, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, no_wrap=True, justify="right")
    return table


def _print_backbones(names: list[str]) -> None:
    from resbackbone.config import config_files

    names = sorted(names, key=lambda name: (config_files()[name].parent.name, _natural(name)))
    caption = "params and MACs with a classifier of 1000 classes, for one image of 224x224"
    table = _table(("family", "name", "type"), ("params", "MACs"), caption)
    previous = ""
    for name in names:
        family = config_files()[name].parent.name
        if previous and family != previous:
            table.add_section()
        table.add_row("" if family == previous else family, name, *_facts(name))
        previous = family
    stdout.print(table)


def _print_weights(names: list[str]) -> None:
    from rich.console import Console

    from resbackbone.checkpoints import find_weights

    table = _table(
        ("name", "config"),
        ("params", "acc@1", "acc@5", "MiB", "license"),
        "* default weights of the config; + for the config with other arguments, `overrides`",
    )
    for name in sorted(names, key=_natural):
        one = find_weights(name)
        mark = " *" if one.default else " +" if one.overrides else ""
        figures = ("" if figure is None else f"{figure:.2f}" for figure in (one.acc1, one.acc5, one.size_mib))
        table.add_row(name, one.config + mark, _rounded(one.params, 1e6, "{:.1f} M"), *figures, one.license or "")
    # At full width, so that names are not truncated; narrower terminals wrap the lines.
    width = stdout.measure(table, options=stdout.options.update(max_width=10_000)).maximum
    Console(highlight=False, width=max(width, stdout.width)).print(table)


def _natural(name: str) -> list[str | int]:
    """Return a sort key with which resnet18 comes before resnet101."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _facts(name: str) -> tuple[str, str, str]:
    """Return the type, parameters and multiply-accumulates of a backbone, as recorded."""
    from resbackbone.config import load_config, recorded_costs

    cost = recorded_costs().get(name, {})
    params, macs = _rounded(cost.get("params"), 1e6, "{:.1f} M"), _rounded(cost.get("macs"), 1e9, "{:.2f} G")
    return str(load_config(name).backbone["type"]), params, macs


def _rounded(count: int | None, unit: float, form: str) -> str:
    """Format a count in a larger unit; "" for None."""
    return "" if count is None else form.format(count / unit)
