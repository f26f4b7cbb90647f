"""A net of torchvision's or timm's kind taken apart: ``nn.Sequential(*net.children())``, whose names are numbers.

lightly's examples, fastai's and many others' nets are that. Layers without parameters count too, so the first stage is
number 4 behind convolution, norm, ReLU and pool, 3 or 2 where some of these are no layers. Others put the stem into a
``Sequential`` of its own, ``layer0`` or ``0``.
"""

from __future__ import annotations

from resbackbone.checkpoints.layouts.layout import Layout
from resbackbone.checkpoints.layouts.table import Table

_PLAIN_STEM = "conv1.{p} 0.{p}\n bn1.{p} 1.{p}"
_TIMM_STEM = "stem.{i}.{p} 0.{i}.{p}\n stem.7.{p} 1.{p}\n maxpool.{i}.{p} 3.{i}.{p}"  # the last norm stands beside it
_NESTED_STEM = "conv1.{p} 0.0.{p}\n bn1.{p} 0.1.{p}"
_DEEP_STEM = "stem.{i}.{p} 0.{i}.{p}\n maxpool.{i}.{p} 1.{i}.{p}"
# What blocks have of their own in lightly's net and in timm's; otherwise their names are the native ones.
_INSIDE = """
    layer{s}.{b}.downsample.{i}.{p}         {stage}.{b}.shortcut.{i}.{p}
    layer{s}.{b}.se_layer.conv{k}.conv.{p}  {stage}.{b}.se.fc{k}.{p}
    layer{s}.{b}.eca_layer.conv.{p}         {stage}.{b}.se.conv.{p}
"""
_STAGE = "layer{s}.{b}.{rest} {stage}.{b}.{rest}"


def _table(stem: str, *, first: int, inside: str = "") -> Table:
    """The names where the first stage has that number."""
    rows = f"{stem}\n{inside}\n{_STAGE}\n fc.{{p}} {first + 5}.{{p}}"
    return Table(rows.replace("{stage}", f"{{s+{first - 1}}}"), full_names=True)


def _layer0(rows: str) -> Table:
    return Table(rows.replace(" 0.", " layer0."), full_names=True)


SEQUENTIAL = Layout(
    "sequential",
    tables=(_table(_PLAIN_STEM, first=4), _table(_TIMM_STEM, first=4)),
    old=(
        # Of two that explain as many names the first counts, so stems that have less come first.
        *(_table(stem, first=first, inside=_INSIDE) for stem in (_NESTED_STEM, _DEEP_STEM) for first in (2, 1)),
        *(_table(stem, first=first, inside=_INSIDE) for stem in (_PLAIN_STEM, _TIMM_STEM) for first in (4, 3, 2)),
        _layer0(_NESTED_STEM),
        _layer0(_DEEP_STEM),
    ),
)
