"""mmpretrain, formerly mmcls: a deep stem of ``ConvModule``, and shortcuts that pool only where they stride.

Source: mmpretrain 1.2.0, ``models/backbones/resnet.py``.
"""

from __future__ import annotations

import re

from resbackbone.checkpoints.layouts.layout import Layout, Tensors
from resbackbone.checkpoints.layouts.table import Table

_SHORTCUT = re.compile(r"(layer\d\.0\.downsample)\.(\d)\.(\w+)")


def _count_pooling(tensors: Tensors) -> Tensors:
    """Number the layers of shortcuts that do not pool as those of the others; here they all pool, or none."""
    pooling = {found[1] for name in tensors if (found := _SHORTCUT.fullmatch(name)) and found[2] == "2"}
    return _shift(tensors, by=1, leave=pooling) if pooling else tensors


def _discount_pooling(tensors: Tensors) -> Tensors:
    """The inverse, for a net whose first stage alone does not stride."""
    if not any((found := _SHORTCUT.fullmatch(name)) and found[2] == "2" for name in tensors):
        return tensors
    return _shift(tensors, by=-1, leave={f"layer{stage}.0.downsample" for stage in (2, 3, 4)})


def _shift(tensors: Tensors, *, by: int, leave: set[str]) -> Tensors:
    def rename(name: str) -> str:
        found = _SHORTCUT.fullmatch(name)
        return name if found is None or found[1] in leave else f"{found[1]}.{int(found[2]) + by}.{found[3]}"

    return {rename(name): tensor for name, tensor in tensors.items()}


def _table(norm: str) -> Table:
    """The names where norms are called so; the ``only_with`` of group and instance norms is what their blocks have."""
    rows = "fc head.fc"
    for index in range(3):
        rows += f"\n stem.{3 * index} stem.{index}.conv \n stem.{3 * index + 1} stem.{index}.{norm}"
    return Table(rows, only_with="" if norm == "bn" else f".{norm}1.")


MMPRETRAIN = Layout(
    "mmpretrain",
    tables=(_table("gn"), _table("in"), _table("bn")),
    finish=_count_pooling,
    prepare=_discount_pooling,
)
