"""``resbackbone info``: the stages of one backbone and their cost."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from resbackbone.cli.console import Imports, echo, import_user_modules, stdout, user_errors


def info(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A name that `resbackbone list` shows, or a .yaml or .py file.")
    ],
    *,
    size: Annotated[str, typer.Option(help="Image size in pixels: one side of a square, or HEIGHTxWIDTH.")] = "224",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    imports: Imports = None,
) -> None:
    """Show a backbone's stages: channels, strides, parameters, multiply-accumulates for one image."""
    from resbackbone.analysis.cost import build_on_meta, measure
    from resbackbone.config import load_config
    from resbackbone.data.pictures import parse_size

    with user_errors():
        import_user_modules(imports)
        pixels = parse_size(size)
        loaded = load_config(config)
        net = build_on_meta(loaded.backbone)
        complexity = measure(net, size=pixels)
    outputs = {feature.name for feature in net.feature_info}
    facts = {
        "name": config,
        "type": type(net).__name__,
        "source": loaded.about.get("source"),
        "config": loaded.backbone,
        "size": [pixels, pixels] if isinstance(pixels, int) else list(pixels),
        "parts": [{**asdict(part), "output": part.name in outputs} for part in complexity.parts],
        "backbone": {"params": complexity.params, "macs": complexity.macs},
        "with_classifier": {"params": complexity.params_with_classifier, "macs": complexity.macs_with_classifier},
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2, default=str))
    else:
        _print(facts)


def _print(facts: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    arguments = ", ".join(f"{key}={value!r}" for key, value in facts["config"].items() if key != "type")
    echo(f"{facts['name']}: {facts['type']}({arguments})")
    if facts["source"]:
        echo(f"source: {facts['source']}")
    echo(f"one image of {facts['size'][0]}x{facts['size'][1]} pixels")
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("part", no_wrap=True)
    for heading in ("channels", "stride", "size", "params", "MACs", "output"):
        table.add_column(heading, justify="right", no_wrap=True)
    for part in facts["parts"]:
        shape = (str(part["channels"]), str(part["stride"]), f"{part['height']}x{part['width']}")
        costs = (f"{part['params']:,}", f"{part['macs']:,}")
        table.add_row(
            part["name"], *shape, *costs, "yes" if part["output"] else "no", end_section=part is facts["parts"][-1]
        )
    for label, total in (("backbone", facts["backbone"]), ("+ classifier", facts["with_classifier"])):
        table.add_row(label, "", "", "", f"{total['params']:,}", f"{total['macs']:,}", "")
    stdout.print(table)
    echo("The classifier: average pooling and a linear layer of 1000 classes, for comparison with published figures.")
