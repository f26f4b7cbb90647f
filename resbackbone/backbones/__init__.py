"""The backbones, each family in a file of its own."""

from resbackbone.backbones.base import Backbone
from resbackbone.backbones.res_layer import ResLayer
from resbackbone.backbones.resnet import ResNet
from resbackbone.backbones.resnet_v1 import ResNetV1b, ResNetV1c, ResNetV1d
from resbackbone.backbones.resnext import ResNeXt
from resbackbone.backbones.wide_resnet import WideResNet

__all__ = ["Backbone", "ResLayer", "ResNeXt", "ResNet", "ResNetV1b", "ResNetV1c", "ResNetV1d", "WideResNet"]
