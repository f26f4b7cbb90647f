"""Key layout of transformers: ResNet, RegNet, BiT, and RT-DETR's ResNet with the stem and shortcuts of ResNet-D.

Source: transformers, ``models/resnet/modeling_resnet.py``, ``models/rt_detr/modeling_rt_detr_resnet.py``,
``models/regnet/modeling_regnet.py`` (RegNetX has the keys of ResNet) and ``models/bit/modeling_bit.py``.
"""

from __future__ import annotations

from resbackbone.checkpoints.layouts.layout import Layout
from resbackbone.checkpoints.layouts.table import Table

_STAGES = """
    layer{s}.{b}.conv{k}  encoder.stages.{s-1}.layers.{b}.layer.{k-1}.convolution
    layer{s}.{b}.bn{k}    encoder.stages.{s-1}.layers.{b}.layer.{k-1}.normalization
    fc                    classifier.1
"""

_PLAIN = """
    conv1                      embedder.embedder.convolution
    bn1                        embedder.embedder.normalization
    layer{s}.{b}.downsample.0  encoder.stages.{s-1}.layers.{b}.shortcut.convolution
    layer{s}.{b}.downsample.1  encoder.stages.{s-1}.layers.{b}.shortcut.normalization
"""
# The third layer of RegNetY is its attention.
_REGNET_Y = """
    layer{s}.{b}.conv3                encoder.stages.{s-1}.layers.{b}.layer.3.convolution
    layer{s}.{b}.bn3                  encoder.stages.{s-1}.layers.{b}.layer.3.normalization
    layer{s}.{b}.se_layer.conv1.conv  encoder.stages.{s-1}.layers.{b}.layer.2.attention.0
    layer{s}.{b}.se_layer.conv2.conv  encoder.stages.{s-1}.layers.{b}.layer.2.attention.2
"""
_BIT = """
    conv1                      embedder.convolution
    layer{s}.{b}.conv{k}       encoder.stages.{s-1}.layers.{b}.conv{k}
    layer{s}.{b}.bn{k}         encoder.stages.{s-1}.layers.{b}.norm{k}
    layer{s}.{b}.downsample.0  encoder.stages.{s-1}.layers.{b}.downsample.conv
    bn                         norm
    fc                         classifier.1
"""

HUGGINGFACE = Layout(
    "huggingface",
    tables=(
        Table(_STAGES + _PLAIN),
        Table(
            _STAGES
            + """
            stem.0                     embedder.embedder.0.convolution
            stem.1                     embedder.embedder.0.normalization
            stem.3                     embedder.embedder.1.convolution
            stem.4                     embedder.embedder.1.normalization
            stem.6                     embedder.embedder.2.convolution
            stem.7                     embedder.embedder.2.normalization
            layer1.{b}.downsample.1    encoder.stages.0.layers.{b}.shortcut.convolution
            layer1.{b}.downsample.2    encoder.stages.0.layers.{b}.shortcut.normalization
            layer{s}.{b}.downsample.1  encoder.stages.{s-1}.layers.{b}.shortcut.1.convolution
            layer{s}.{b}.downsample.2  encoder.stages.{s-1}.layers.{b}.shortcut.1.normalization
            """
        ),
        Table(_REGNET_Y + _STAGES + _PLAIN),
        Table(_BIT),
    ),
)
