"""Key layout of mmpretrain, formerly mmcls: a deep stem of ``ConvModule``, and shortcuts that pool only if they stride.

Source: mmpretrain 1.2.0, ``models/backbones/resnet.py``.
"""

from __future__ import annotations

import re

from resbackbone.checkpoints.layouts.layout import Layout, Tensors
from resbackbone.checkpoints.layouts.table import Table

_SHORTCUT = re.compile(r"(layer\d\.0\.downsample)\.(\d)\.(\w+)")


def _count_pooling(tensors: Tensors) -> Tensors:
    """Shift the indices in shortcuts without pooling, if others pool; natively all shortcuts of a net pool, or none."""
    pooling = {found[1] for name in tensors if (found := _SHORTCUT.fullmatch(name)) and found[2] == "2"}
    return _shift(tensors, by=1, leave=pooling) if pooling else tensors


def _discount_pooling(tensors: Tensors) -> Tensors:
    """Invert `_count_pooling`, for a net of which only the first stage does not stride."""
    if not any((found := _SHORTCUT.fullmatch(name)) and found[2] == "2" for name in tensors):
        return tensors
    return _shift(tensors, by=-1, leave={f"layer{stage}.0.downsample" for stage in (2, 3, 4)})


def _shift(tensors: Tensors, *, by: int, leave: set[str]) -> Tensors:
    def rename(name: str) -> str:
        found = _SHORTCUT.fullmatch(name)
        return name if found is None or found[1] in leave else f"{found[1]}.{int(found[2]) + by}.{found[3]}"

    return {rename(name): tensor for name, tensor in tensors.items()}


def _table(norm: str) -> Table:
    """Return the table for nets with this attribute name of norms; that of "gn" and "in" needs blocks with it."""
    rows = "fc head.fc"
    for index in range(3):
        rows += f"\n stem.{3 * index} stem.{index}.conv \n stem.{3 * index + 1} stem.{index}.{norm}"
    return Table(rows, only_with="" if norm == "bn" else f".{norm}1.")


MMPRETRAIN = Layout(
    "mmpretrain",
    tables=(_table("gn"), _table("in"), _table("bn")),
    values_to_native=_count_pooling,
    values_to_foreign=_discount_pooling,
)
