"""Layers independent of ResNet: convolutions, norms, attention, drop path, plugins."""

from resbackbone.layers.blur_pool import BlurPool2d
from resbackbone.layers.cbam import CBAM
from resbackbone.layers.conv import ConvNormAct, build_conv_layer
from resbackbone.layers.deform_conv import DeformConv2d, ModulatedDeformConv2d
from resbackbone.layers.drop_path import DropPath
from resbackbone.layers.eca import ECALayer
from resbackbone.layers.frozen_batch_norm import FrozenBatchNorm2d
from resbackbone.layers.ibn import IBN
from resbackbone.layers.module import Module
from resbackbone.layers.norm import build_norm_layer
from resbackbone.layers.plugins import build_plugin_layer, plugin_name
from resbackbone.layers.saconv import SAConv2d
from resbackbone.layers.se import SELayer
from resbackbone.layers.selective_kernel import SelectiveKernelConv2d
from resbackbone.layers.sequential import Sequential
from resbackbone.layers.split_attention import SplitAttentionConv2d
from resbackbone.layers.std_conv import StdConv2d
from resbackbone.layers.weight_standardization import ConvAWS2d, ConvWS2d

__all__ = [
    "CBAM",
    "IBN",
    "BlurPool2d",
    "ConvAWS2d",
    "ConvNormAct",
    "ConvWS2d",
    "DeformConv2d",
    "DropPath",
    "ECALayer",
    "FrozenBatchNorm2d",
    "ModulatedDeformConv2d",
    "Module",
    "SAConv2d",
    "SELayer",
    "SelectiveKernelConv2d",
    "Sequential",
    "SplitAttentionConv2d",
    "StdConv2d",
    "build_conv_layer",
    "build_norm_layer",
    "build_plugin_layer",
    "plugin_name",
]
