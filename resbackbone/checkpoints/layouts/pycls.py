"""Key layout of pycls, the code of RegNet's authors.

Source: facebookresearch/pycls, ``pycls/models/anynet.py``.
"""

from __future__ import annotations

from resbackbone.checkpoints.layouts.layout import Layout
from resbackbone.checkpoints.layouts.table import Table

PYCLS = Layout(
    "pycls",
    tables=(
        Table(
            """
            conv1                         stem.conv
            bn1                           stem.bn
            layer{s}.{b}.conv{k}          s{s}.b{b+1}.f.{k:letter}
            layer{s}.{b}.bn{k}            s{s}.b{b+1}.f.{k:letter}_bn
            layer{s}.{b}.se_layer.conv1.conv  s{s}.b{b+1}.f.se.f_ex.0
            layer{s}.{b}.se_layer.conv2.conv  s{s}.b{b+1}.f.se.f_ex.2
            layer{s}.{b}.downsample.0     s{s}.b{b+1}.proj
            layer{s}.{b}.downsample.1     s{s}.b{b+1}.bn
            fc                            head.fc
            """
        ),
    ),
)
