"""The ``resbackbone`` command: one file per subcommand; torch is imported only when one runs."""

from __future__ import annotations

from typing import Annotated

import typer

from resbackbone.cli.bench import bench
from resbackbone.cli.convert import convert
from resbackbone.cli.export import export
from resbackbone.cli.extract import extract
from resbackbone.cli.info import info
from resbackbone.cli.list import list_backbones
from resbackbone.cli.load_report import load_report
from resbackbone.cli.test import measure
from resbackbone.cli.train import train

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_show_locals=False, rich_markup_mode="markdown"
)
app.command("list")(list_backbones)
app.command("info")(info)
app.command("extract")(extract)
app.command("bench")(bench)
app.command("convert")(convert)
app.command("export")(export)
app.command("load-report")(load_report)
app.command("train")(train)
app.command("test")(measure)


def main() -> None:
    """Run the command line."""
    app(prog_name="resbackbone")


def _print_version(show: bool) -> None:
    if show:
        from resbackbone import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _resbackbone(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """ResNet backbones: list, extract features, convert and export weights, benchmark, train."""
