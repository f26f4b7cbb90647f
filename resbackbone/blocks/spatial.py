"""Which convolution a block that builds its 3x3s itself has to build."""

from __future__ import annotations

from resbackbone.blocks.base import ResidualBlock
from resbackbone.layers.module import Config


def spatial_conv_cfg(block: ResidualBlock, stride: int) -> Config | None:
    """Return the config of a block's 3x3: its ``dcn``, unless that falls back at this stride, or its ``conv_cfg``."""
    if block.dcn is None:
        return block.conv_cfg
    dcn = dict(block.dcn)
    falls_back = dcn.pop("fallback_on_stride", False) and stride > 1
    return block.conv_cfg if falls_back else dcn
