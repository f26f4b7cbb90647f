"""Residual blocks, one per file, over one shared base."""

from resbackbone.blocks.anti_aliased import AntiAliasedBasicBlock, AntiAliasedBottleneck, AntiAliasedResNeXtBottleneck
from resbackbone.blocks.base import ResidualBlock
from resbackbone.blocks.basic import BasicBlock
from resbackbone.blocks.bottleneck import Bottleneck
from resbackbone.blocks.detectors import DetectorsBottleneck, DetectorsResNeXtBottleneck
from resbackbone.blocks.ibn import InstanceNormBasicBlock, InstanceNormBottleneck, InstanceNormResNeXtBottleneck
from resbackbone.blocks.preact import PreActBasicBlock, PreActBottleneck
from resbackbone.blocks.regnet import RegNetBottleneck
from resbackbone.blocks.res2 import Bottle2neck
from resbackbone.blocks.resnext import ResNeXtBottleneck
from resbackbone.blocks.selective_kernel import (
    SelectiveKernelBasicBlock,
    SelectiveKernelBottleneck,
    SelectiveKernelResNeXtBottleneck,
)
from resbackbone.blocks.simplified import SimplifiedBasicBlock
from resbackbone.blocks.split import SplitAttentionBottleneck
from resbackbone.blocks.trident import TridentBottleneck

__all__ = [
    "AntiAliasedBasicBlock",
    "AntiAliasedBottleneck",
    "AntiAliasedResNeXtBottleneck",
    "BasicBlock",
    "Bottle2neck",
    "Bottleneck",
    "DetectorsBottleneck",
    "DetectorsResNeXtBottleneck",
    "InstanceNormBasicBlock",
    "InstanceNormBottleneck",
    "InstanceNormResNeXtBottleneck",
    "PreActBasicBlock",
    "PreActBottleneck",
    "RegNetBottleneck",
    "ResNeXtBottleneck",
    "ResidualBlock",
    "SelectiveKernelBasicBlock",
    "SelectiveKernelBottleneck",
    "SelectiveKernelResNeXtBottleneck",
    "SimplifiedBasicBlock",
    "SplitAttentionBottleneck",
    "TridentBottleneck",
]
