"""``resbackbone load-report``: the checkpoint loading report for a backbone."""

from __future__ import annotations

from typing import Annotated

import typer

from resbackbone.cli.console import Imports, import_user_modules, stdout, user_errors


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
        typer.Option(help="Key prefix of the backbone, if SRC has several.", show_default="detected"),
    ] = None,
    imports: Imports = None,
) -> None:
    """Show which keys of SRC load into CONFIG; the exit status is 1 if the checkpoint does not fit."""
    from resbackbone.checkpoints import load_checkpoint
    from resbackbone.config import construct_backbone

    with user_errors():
        import_user_modules(imports)
        report = load_checkpoint(construct_backbone(config), source, strict=False, prefix=prefix)
    stdout.print(report)
    if report.problems():
        raise typer.Exit(1)
