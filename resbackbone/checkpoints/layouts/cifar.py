"""Key layout of kuangliu/pytorch-cifar and the many projects derived from it; keys inside of blocks are native.

Source: kuangliu/pytorch-cifar, ``models/resnet.py``.
"""

from __future__ import annotations

from resbackbone.checkpoints.layouts.layout import Layout
from resbackbone.checkpoints.layouts.table import Table

CIFAR = Layout(
    "cifar",
    tables=(
        Table(
            """
            layer{s}.{b}.downsample.{i}  layer{s}.{b}.shortcut.{i}
            fc                           linear
            """
        ),
    ),
)
