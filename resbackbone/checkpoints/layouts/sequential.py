"""Key layout of ``nn.Sequential(*net.children())`` of torchvision's and timm's nets, which has numbers for names.

Examples of lightly, fastai and many others build it. Layers without parameters count too, so that the first stage is
number 4 after convolution, norm, ReLU and pool, and 3 or 2 without some of these. Others put the stem into a
``Sequential`` of its own, ``layer0`` or ``0``.
"""

from __future__ import annotations

from resbackbone.checkpoints.layouts.layout import Layout
from resbackbone.checkpoints.layouts.table import Table

_PLAIN_STEM = "conv1.{p} 0.{p}\n bn1.{p} 1.{p}"
_TIMM_STEM = "stem.{i}.{p} 0.{i}.{p}\n stem.7.{p} 1.{p}\n maxpool.{i}.{p} 3.{i}.{p}"  # the last norm is outside of it
_NESTED_STEM = "conv1.{p} 0.0.{p}\n bn1.{p} 0.1.{p}"
_DEEP_STEM = "stem.{i}.{p} 0.{i}.{p}\n maxpool.{i}.{p} 1.{i}.{p}"
# Keys inside of blocks that lightly or timm names otherwise; all others are native.
_INSIDE = """
    layer{s}.{b}.downsample.{i}.{p}         {stage}.{b}.shortcut.{i}.{p}
    layer{s}.{b}.se_layer.conv{k}.conv.{p}  {stage}.{b}.se.fc{k}.{p}
    layer{s}.{b}.eca_layer.conv.{p}         {stage}.{b}.se.conv.{p}
"""
_STAGE = "layer{s}.{b}.{rest} {stage}.{b}.{rest}"


def _table(stem: str, *, first: int, inside: str = "") -> Table:
    """Return the table for nets with this number of the first stage."""
    rows = f"{stem}\n{inside}\n{_STAGE}\n fc.{{p}} {first + 5}.{{p}}"
    return Table(rows.replace("{stage}", f"{{s+{first - 1}}}"), full_names=True)


def _layer0(rows: str) -> Table:
    return Table(rows.replace(" 0.", " layer0."), full_names=True)


SEQUENTIAL = Layout(
    "sequential",
    tables=(_table(_PLAIN_STEM, first=4), _table(_TIMM_STEM, first=4)),
    old=(
        # Of tables that fit equally well the first is used, so that smaller stems come first.
        *(_table(stem, first=first, inside=_INSIDE) for stem in (_NESTED_STEM, _DEEP_STEM) for first in (2, 1)),
        *(_table(stem, first=first, inside=_INSIDE) for stem in (_PLAIN_STEM, _TIMM_STEM) for first in (4, 3, 2)),
        _layer0(_NESTED_STEM),
        _layer0(_DEEP_STEM),
    ),
)
