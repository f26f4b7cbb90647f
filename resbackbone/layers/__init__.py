"""Leaf modules that know nothing of ResNet: convolutions, norms, drop path, plugins."""

from resbackbone.layers.conv import ConvNormAct, build_conv_layer
from resbackbone.layers.deform_conv import DeformConv2d, ModulatedDeformConv2d
from resbackbone.layers.drop_path import DropPath
from resbackbone.layers.module import Module, Sequential
from resbackbone.layers.norm import FrozenBatchNorm2d, build_norm_layer
from resbackbone.layers.plugins import build_plugin_layer, plugin_name

__all__ = [
    "ConvNormAct",
    "DeformConv2d",
    "DropPath",
    "FrozenBatchNorm2d",
    "ModulatedDeformConv2d",
    "Module",
    "Sequential",
    "build_conv_layer",
    "build_norm_layer",
    "build_plugin_layer",
    "plugin_name",
]
