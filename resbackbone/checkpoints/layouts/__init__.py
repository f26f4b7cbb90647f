"""Key layouts: how each library names the tensors of a ResNet. One file per library, each with two-way key tables."""

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
from resbackbone.utils.validation import UnknownKeyError, nearest

__all__ = ["ALIASES", "LAYOUTS", "Layout", "Tensors", "get_layout", "is_native"]

# In the order in which they are tried; of layouts that fit equally well, the first is selected.
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("native"),
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
# Libraries with the key layout of another.
ALIASES = {"torchvision": "native", "mmdet": "native", "mmseg": "native", "mmcls": "mmpretrain"}


def get_layout(name: str) -> Layout:
    """Return a key layout by its name or alias.

    Raises:
        KeyError: If it is unknown; the nearest name is given.
    """
    name = ALIASES.get(name, name)
    if name not in LAYOUTS:
        raise UnknownKeyError(f"unknown layout {name!r}{nearest(name, [*LAYOUTS, *ALIASES])}")
    return LAYOUTS[name]
