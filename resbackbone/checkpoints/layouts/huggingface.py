"""Hugging Face's ResNet, and that of its RT-DETR, which has ResNet-D's stem and shortcuts.

Source: transformers, ``models/resnet/modeling_resnet.py`` and ``models/rt_detr/modeling_rt_detr_resnet.py``.
"""

from __future__ import annotations

from resbackbone.checkpoints.layouts.layout import Layout
from resbackbone.checkpoints.layouts.table import Table

_STAGES = """
    layer{s}.{b}.conv{k}  encoder.stages.{s-1}.layers.{b}.layer.{k-1}.convolution
    layer{s}.{b}.bn{k}    encoder.stages.{s-1}.layers.{b}.layer.{k-1}.normalization
    fc                    classifier.1
"""

HUGGINGFACE = Layout(
    "huggingface",
    tables=(
        Table(
            _STAGES
            + """
            conv1                      embedder.embedder.convolution
            bn1                        embedder.embedder.normalization
            layer{s}.{b}.downsample.0  encoder.stages.{s-1}.layers.{b}.shortcut.convolution
            layer{s}.{b}.downsample.1  encoder.stages.{s-1}.layers.{b}.shortcut.normalization
            """
        ),
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
    ),
)
