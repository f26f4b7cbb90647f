"""ResNets in the manner of kuangliu/pytorch-cifar, from which many projects start; inside of blocks as here.

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
