"""One ResNet backbone family for every detection and segmentation framework.

>>> import torch
>>> from resbackbone import build_backbone
>>> net = build_backbone("resnet18", out_indices=(1, 3))
>>> [tuple(feature.shape) for feature in net(torch.zeros(1, 3, 64, 96))]
[(1, 128, 8, 12), (1, 512, 2, 3)]
>>> net.out_channels, net.out_strides
((128, 512), (8, 32))
"""

from resbackbone.backbones import (
    DetectoRS_ResNet,
    DetectoRS_ResNeXt,
    RegNet,
    Res2Net,
    ResNeSt,
    ResNet,
    ResNet_CIFAR,
    ResNetAA,
    ResNetIBN,
    ResNetRS,
    ResNetT,
    ResNetV1b,
    ResNetV1c,
    ResNetV1d,
    ResNetV2,
    ResNetV2T,
    ResNeXt,
    ResNeXtAA,
    ResNeXtIBN,
    ResNeXtT,
    SEResNet,
    SEResNeXt,
    SharedHead,
    SKResNet,
    SKResNeXt,
    TridentResNet,
    WideResNet,
)
from resbackbone.backbones.feature_info import FeatureInfo
from resbackbone.config import build_backbone, list_backbones, load_pretrained, read_checkpoint
from resbackbone.layers.initialization import guard, read_safely, set_loader
from resbackbone.registry import MODELS, set_guard

set_guard(guard, read_safely)  # registries lie below layers, and do not import them
set_loader(load_pretrained, read_checkpoint)  # layers lie below checkpoints, and do not import them

__version__ = "0.1.0"

__all__ = [
    "MODELS",
    "DetectoRS_ResNeXt",
    "DetectoRS_ResNet",
    "FeatureInfo",
    "RegNet",
    "Res2Net",
    "ResNeSt",
    "ResNeXt",
    "ResNeXtAA",
    "ResNeXtIBN",
    "ResNeXtT",
    "ResNet",
    "ResNetAA",
    "ResNetIBN",
    "ResNetRS",
    "ResNetT",
    "ResNetV1b",
    "ResNetV1c",
    "ResNetV1d",
    "ResNetV2",
    "ResNetV2T",
    "ResNet_CIFAR",
    "SEResNeXt",
    "SEResNet",
    "SKResNeXt",
    "SKResNet",
    "SharedHead",
    "TridentResNet",
    "WideResNet",
    "build_backbone",
    "list_backbones",
]
