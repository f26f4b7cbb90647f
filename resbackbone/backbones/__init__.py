"""Backbones, one file per family."""

from resbackbone.backbones.base import Backbone
from resbackbone.backbones.detectors_resnet import DetectoRS_ResNet, DetectoRS_ResNeXt
from resbackbone.backbones.regnet import RegNet
from resbackbone.backbones.res2net import Res2Net
from resbackbone.backbones.res_layer import ResLayer
from resbackbone.backbones.resnest import ResNeSt
from resbackbone.backbones.resnet import ResNet
from resbackbone.backbones.resnet_aa import ResNetAA
from resbackbone.backbones.resnet_cifar import ResNet_CIFAR
from resbackbone.backbones.resnet_ibn import ResNetIBN
from resbackbone.backbones.resnet_rs import ResNetRS
from resbackbone.backbones.resnet_t import ResNetT
from resbackbone.backbones.resnet_v1 import ResNetV1b, ResNetV1c, ResNetV1d
from resbackbone.backbones.resnet_v2 import ResNetV2
from resbackbone.backbones.resnext import ResNeXt
from resbackbone.backbones.seresnet import SEResNet, SEResNeXt
from resbackbone.backbones.shared_head import SharedHead
from resbackbone.backbones.skresnet import SKResNet
from resbackbone.backbones.trident_resnet import TridentResNet
from resbackbone.backbones.wide_resnet import WideResNet

__all__ = [
    "Backbone",
    "DetectoRS_ResNeXt",
    "DetectoRS_ResNet",
    "RegNet",
    "Res2Net",
    "ResLayer",
    "ResNeSt",
    "ResNeXt",
    "ResNet",
    "ResNetAA",
    "ResNetIBN",
    "ResNetRS",
    "ResNetT",
    "ResNetV1b",
    "ResNetV1c",
    "ResNetV1d",
    "ResNetV2",
    "ResNet_CIFAR",
    "SEResNeXt",
    "SEResNet",
    "SKResNet",
    "SharedHead",
    "TridentResNet",
    "WideResNet",
]
