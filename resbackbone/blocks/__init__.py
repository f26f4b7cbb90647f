"""Residual blocks, one per file, over one shared base."""

from resbackbone.blocks.base import ResidualBlock
from resbackbone.blocks.basic import BasicBlock
from resbackbone.blocks.bottleneck import Bottleneck
from resbackbone.blocks.resnext import ResNeXtBottleneck

__all__ = ["BasicBlock", "Bottleneck", "ResNeXtBottleneck", "ResidualBlock"]
