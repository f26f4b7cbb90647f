"""Key layout of torchvision's RegNet; its ResNets have the native layout.

Source: torchvision 0.28.0, ``models/regnet.py``.
"""

from __future__ import annotations

from resbackbone.checkpoints.layouts.layout import Layout
from resbackbone.checkpoints.layouts.table import Table

_BLOCK = "trunk_output.block{s}.block{s}-{b}"

TORCHVISION_REGNET = Layout(
    "torchvision-regnet",
    tables=(
        Table(
            f"""
            conv1                               stem.0
            bn1                                 stem.1
            layer{{s}}.{{b}}.conv{{k}}                {_BLOCK}.f.{{k:letter}}.0
            layer{{s}}.{{b}}.bn{{k}}                  {_BLOCK}.f.{{k:letter}}.1
            layer{{s}}.{{b}}.se_layer.conv{{k}}.conv  {_BLOCK}.f.se.fc{{k}}
            layer{{s}}.{{b}}.downsample.{{i}}         {_BLOCK}.proj.{{i}}
            """
        ),
    ),
)
