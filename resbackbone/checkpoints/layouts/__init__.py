"""How each library names the tensors of a ResNet; one file per library, each a table that reads in both directions."""

from __future__ import annotations

from resbackbone.checkpoints.layouts.bit import BIT
from resbackbone.checkpoints.layouts.caffe2 import CAFFE2
from resbackbone.checkpoints.layouts.cifar import CIFAR
from resbackbone.checkpoints.layouts.detectron2 import DETECTRON2
from resbackbone.checkpoints.layouts.huggingface import HUGGINGFACE
from resbackbone.checkpoints.layouts.layout import Layout, Tensors, is_native
from resbackbone.checkpoints.layouts.mmaction2 import MMACTION2
from resbackbone.checkpoints.layouts.mmpretrain import MMPRETRAIN
from resbackbone.checkpoints.layouts.paddle import PADDLE
from resbackbone.checkpoints.layouts.pycls import PYCLS
from resbackbone.checkpoints.layouts.rtdetr import RTDETR
from resbackbone.checkpoints.layouts.sequential import SEQUENTIAL
from resbackbone.checkpoints.layouts.timm import TIMM, TIMM_REGNET, TIMM_RESNETV2
from resbackbone.checkpoints.layouts.torchvision import TORCHVISION_REGNET

__all__ = ["ALIASES", "LAYOUTS", "NATIVE", "Layout", "Tensors", "find_layout", "is_native"]

NATIVE = Layout("native")
# In the order in which they are tried; where two fit equally well, the first is meant.
LAYOUTS = {
    layout.name: layout
    for layout in (
        NATIVE,
        TIMM,
        MMPRETRAIN,
        TIMM_RESNETV2,
        TIMM_REGNET,
        TORCHVISION_REGNET,
        PYCLS,
        DETECTRON2,
        CAFFE2,
        HUGGINGFACE,
        PADDLE,
        RTDETR,
        MMACTION2,
        CIFAR,
        SEQUENTIAL,
        BIT,
    )
}
# Libraries whose names are those of another.
ALIASES = {"torchvision": "native", "mmdet": "native", "mmseg": "native", "mmcls": "mmpretrain"}
