"""Key layout of detectron2: stages ``res2`` to ``res5``, each norm inside its convolution.

Source: facebookresearch/detectron2, ``modeling/backbone/resnet.py``; the deep stem of ``projects/DeepLab``.
"""

from __future__ import annotations

from resbackbone.checkpoints.layouts.layout import Layout
from resbackbone.checkpoints.layouts.table import Table

_STAGES = """
    layer{s}.{b}.conv{k}       res{s+1}.{b}.conv{k}
    layer{s}.{b}.bn{k}         res{s+1}.{b}.conv{k}.norm
    layer{s}.{b}.downsample.0  res{s+1}.{b}.shortcut
    layer{s}.{b}.downsample.1  res{s+1}.{b}.shortcut.norm
    fc                         linear
"""

DETECTRON2 = Layout(
    "detectron2",
    tables=(
        Table(
            _STAGES
            + """
            conv1  stem.conv1
            bn1    stem.conv1.norm
            """
        ),
        Table(
            _STAGES
            + """
            stem.0  stem.conv1
            stem.1  stem.conv1.norm
            stem.3  stem.conv2
            stem.4  stem.conv2.norm
            stem.6  stem.conv3
            stem.7  stem.conv3.norm
            """
        ),
    ),
)
