"""Residual blocks, one per file, over one base class."""

from resbackbone.blocks.base import ResidualBlock
from resbackbone.blocks.basic import BasicBlock
from resbackbone.blocks.bottleneck import Bottleneck
from resbackbone.blocks.detectors import DetectorsBottleneck
from resbackbone.blocks.preact import PreActBasicBlock, PreActBottleneck
from resbackbone.blocks.regnet import RegNetBottleneck
from resbackbone.blocks.res2 import Bottle2neck
from resbackbone.blocks.selective_kernel import SelectiveKernelBasicBlock, SelectiveKernelBottleneck
from resbackbone.blocks.simplified import SimplifiedBasicBlock
from resbackbone.blocks.split import SplitAttentionBottleneck
from resbackbone.blocks.trident import TridentBottleneck

__all__ = [
    "BasicBlock",
    "Bottle2neck",
    "Bottleneck",
    "DetectorsBottleneck",
    "PreActBasicBlock",
    "PreActBottleneck",
    "RegNetBottleneck",
    "ResidualBlock",
    "SelectiveKernelBasicBlock",
    "SelectiveKernelBottleneck",
    "SimplifiedBasicBlock",
    "SplitAttentionBottleneck",
    "TridentBottleneck",
]
