"""``resbackbone load-report``: the checkpoint loading report for a backbone."""

from __future__ import annotations

from typing import Annotated

import typer

from resbackbone.cli.console import Imports, import_named, results, user_errors


def load_report(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A name that `resbackbone list` shows, or a .yaml or .py file.")
    ],
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A file, a name that `resbackbone list --weights` shows, or a URL.")
    ],
    *,
    prefix: Annotated[
        str | None,
        typer.Option(help="What stands before the backbone's keys, where SRC has several.", show_default="found out"),
    ] = None,
    imports: Imports = None,
) -> None:
    """Show what loading SRC into CONFIG does, key by key; the exit status is 1 if it would be refused."""
    from resbackbone.checkpoints import load_checkpoint
    from resbackbone.checkpoints.loading import problems
    from resbackbone.config import construct_backbone

    with user_errors():
        import_named(imports)
        report = load_checkpoint(construct_backbone(config), source, strict=False, prefix=prefix)
    results.print(report)
    if problems(report):
        raise typer.Exit(1)
