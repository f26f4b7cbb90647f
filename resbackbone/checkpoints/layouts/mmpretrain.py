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


MMPRETRAIN = Layout(
    "mmpretrain",
    tables=(
        Table(
            """
            stem.0  stem.0.conv
            stem.1  stem.0.bn
            stem.3  stem.1.conv
            stem.4  stem.1.bn
            stem.6  stem.2.conv
            stem.7  stem.2.bn
            fc      head.fc
            """
        ),
    ),
    finish=_count_pooling,
    prepare=_discount_pooling,
)
