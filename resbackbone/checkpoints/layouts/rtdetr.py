"""Key layout of PResNet, the ResNet in the code of RT-DETR's authors and in projects based on it.

Source: lyuwenyu/RT-DETR, ``rtdetr_pytorch/src/nn/backbone/presnet.py``. In variant d all shortcuts pool except those of
the first stage, and the first convolution of the stem has the same name in plain and deep stems.
"""

from __future__ import annotations

from resbackbone.checkpoints.layouts.layout import Layout
from resbackbone.checkpoints.layouts.table import Table

_BLOCKS = """
    layer{s}.{b}.conv{k}  res_layers.{s-1}.blocks.{b}.branch2{k:letter}.conv
    layer{s}.{b}.bn{k}    res_layers.{s-1}.blocks.{b}.branch2{k:letter}.norm
"""
_PLAIN_STEM = """
    conv1  conv1.conv1_1.conv
    bn1    conv1.conv1_1.norm
"""
_DEEP_STEM = """
    stem.0  conv1.conv1_1.conv
    stem.1  conv1.conv1_1.norm
    stem.3  conv1.conv1_2.conv
    stem.4  conv1.conv1_2.norm
    stem.6  conv1.conv1_3.conv
    stem.7  conv1.conv1_3.norm
"""
_SHORTCUTS = """
    layer{s}.{b}.downsample.0  res_layers.{s-1}.blocks.{b}.short.conv
    layer{s}.{b}.downsample.1  res_layers.{s-1}.blocks.{b}.short.norm
"""
_POOLING_SHORTCUTS = """
    layer1.{b}.downsample.1    res_layers.0.blocks.{b}.short.conv
    layer1.{b}.downsample.2    res_layers.0.blocks.{b}.short.norm
    layer{s}.{b}.downsample.1  res_layers.{s-1}.blocks.{b}.short.conv.conv
    layer{s}.{b}.downsample.2  res_layers.{s-1}.blocks.{b}.short.conv.norm
"""

RTDETR = Layout(
    "rtdetr",
    tables=(
        Table(_BLOCKS + _PLAIN_STEM + _SHORTCUTS),
        Table(_BLOCKS + _DEEP_STEM + _SHORTCUTS),
        Table(_BLOCKS + _DEEP_STEM + _POOLING_SHORTCUTS),
    ),
)
