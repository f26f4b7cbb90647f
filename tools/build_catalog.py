"""Write resbackbone/checkpoints/hub/catalog.yaml from the metadata of the installed packages.

Entries of origins that are not installed are kept: run it in an environment with torchvision and timm, and in one with
mmdet, mmseg and mmpretrain. Every backbone is compared with the model of its origin, which must have the keys of the
layout and our shapes. Published figures that differ from those of the model are reported.

    python tools/build_catalog.py            # update the catalog from the installed packages
    python tools/build_catalog.py --check    # write nothing; fail if the catalog differs
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import typer
import yaml
from catalog_origins import ORIGINS, Published, Values
from torch import nn

from resbackbone.analysis.cost import build_on_meta, measure
from resbackbone.backbones import Backbone
from resbackbone.checkpoints.conversion import convert_state_dict
from resbackbone.cli.console import with_progress
from resbackbone.config import load_config, recorded_costs

CATALOG = Path(__file__).parent.parent / "resbackbone" / "checkpoints" / "hub" / "catalog.yaml"
HEADER = "# Written by tools/build_catalog.py from the metadata of these packages, never by hand.\n"
# In the order of the file; values that are None, False or empty are left out.
KEYS = (
    *("url", "sha256", "layout", "config", "overrides", "params", "macs", "acc1", "acc5", "classes", "license"),
    *("preprocessing", "crop_pct", "size_mib", "default", "aliases"),
)
_HEAD = re.compile(r"(fc|bn|gn)\.")  # the classifier, and the norm in front of it that ResNetV2 may have


def main(
    *,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit with 1 where the file differs.")] = False,
) -> None:
    """Write the catalog of published weights."""
    text = CATALOG.read_text(encoding="utf-8") if CATALOG.exists() else "{packages: {}, weights: {}}"
    old = yaml.safe_load(text)
    versions = {name: installed(origin.packages) for name, origin in ORIGINS.items()}
    fresh = {name for name, found in versions.items() if found is not None}
    if check:  # other releases may have other metadata
        fresh = {name for name in fresh if versions[name] == old["packages"].get(name)}
    weights = {name: entry for name, entry in old["weights"].items() if name.partition("/")[0] not in fresh}
    for name in [name for name in ORIGINS if name in fresh]:
        published = list(ORIGINS[name].read())
        for one in [] if check else with_progress(published, name):
            for report in differences(one):
                typer.echo(f"{one.name}: {report}", err=True)
        weights |= {one.name: entry(one) for one in published}
    packages = {name: versions[name] if name in fresh else old["packages"].get(name) for name in ORIGINS}
    new = dump(packages, with_one_default(weights))
    if not check:
        CATALOG.write_text(new, encoding="utf-8")
    elif new != text:
        sys.exit(f"{CATALOG.name} is out of date; run `python tools/build_catalog.py`")
    typer.echo(f"{'checked' if check else 'written'}: {', '.join(name for name in ORIGINS if name in fresh)}")


def installed(packages: tuple[str, ...]) -> dict[str, str] | None:
    """Return the releases of distributions; None unless all are installed."""
    try:
        return {name: metadata.version(name).partition("+")[0] for name in packages}
    except metadata.PackageNotFoundError:
        return None


def entry(published: Published) -> Values:
    """Return the catalog entry of published weights."""
    config, overrides = published.config, published.values.get("overrides")
    if overrides:
        complexity = measure(our_model(config, json.dumps(overrides)))
        costs = {"params": complexity.params_with_classifier, "macs": complexity.macs_with_classifier}
    else:
        costs = recorded_costs()[config]
    values = {**published.values, "config": config, **costs, "default": published.preferred}
    assert set(values) <= set(KEYS), values
    known = {key for key, value in values.items() if value or (value == 0 and value is not False)}
    return {key: values[key] for key in KEYS if key in known}


def with_one_default(weights: dict[str, Values]) -> dict[str, Values]:
    """Keep one default per config, that of the first origin in the order of ``ORIGINS``."""
    order = list(ORIGINS)
    taken: set[str] = set()
    for name in sorted(weights, key=lambda name: order.index(name.partition("/")[0])):
        if weights[name].get("default"):
            if weights[name]["config"] in taken:
                del weights[name]["default"]
            taken.add(weights[name]["config"])
    return weights


def dump(packages: Values, weights: dict[str, Values]) -> str:
    """Return the text of the catalog, one line per value."""
    lines = ["packages:", *(f"  {origin}: {_flow(found)}" for origin, found in packages.items()), "weights:"]
    for name, values in sorted(weights.items()):
        lines += [f"  {_flow(name)}:", *(f"    {key}: {_flow(value)}" for key, value in values.items())]
    return HEADER + "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=sys.maxsize)
    return text.removesuffix("...\n").strip()


def differences(published: Published) -> Iterator[str]:
    """Yield the figures that the origin publishes and that differ from those of our backbone.

    Raises:
        ValueError: If keys or shapes of the tensors differ, so that they could not be loaded.
    """
    net = our_model(published.config, json.dumps(published.values.get("overrides") or {}))
    if published.build is not None:
        with shapes_only():
            theirs = published.build()
        if misfits := compare(theirs, published.values["layout"], net):
            raise ValueError(f"{published.name} does not fit the config {published.config!r}: {', '.join(misfits[:5])}")
    complexity = measure(net)
    if published.params:
        classes = published.values["classes"]
        params = complexity.params + (complexity.parts[-1].channels + 1) * classes
        step = 10**4 if published.params % 10**4 == 0 else 1  # rounding of the origin
        if abs(params - published.params) > step / 2:
            yield f"states {published.params:,} parameters; its backbone and {classes} classes have {params:,}"
    if published.gmacs and published.gmacs != round(complexity.macs_with_classifier / 1e9, 3):
        yield f"states {published.gmacs} thousand million multiply-accumulates, not {complexity.macs_with_classifier:,}"


@cache
def our_model(config: str, overrides: str) -> Backbone:
    """Build one of our backbones on the meta device; ``overrides`` is JSON."""
    return build_on_meta({**load_config(config).backbone, **json.loads(overrides)})


@contextmanager
def shapes_only() -> Iterator[None]:
    """Build models on the meta device within the block, also those that compute while they are built."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, value: nn.Parameter | None) -> None:
        register(module, name, None if value is None else nn.Parameter(value.to("meta"), value.requires_grad))

    with patch.object(nn.Module, "register_parameter", register_on_meta):
        yield


def compare(theirs: nn.Module, layout: str, ours: Backbone) -> list[str]:
    """List the tensors that only one of two models has, or that differ in shape; classifiers excluded."""
    native = convert_state_dict(theirs.state_dict(), source=layout, target="native")
    shapes = {name: value.shape for name, value in native.items() if not _HEAD.match(name)}
    own = {name: value.shape for name, value in ours.state_dict().items() if not _HEAD.match(name)}
    return sorted(name for name in shapes | own if shapes.get(name) != own.get(name))


if __name__ == "__main__":
    typer.run(main)
