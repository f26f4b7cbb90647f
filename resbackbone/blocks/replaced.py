"""What blocks share whose spatial convolution is of a type of its own."""

from __future__ import annotations

from typing import Any

from resbackbone.blocks.base import ResidualBlock
from resbackbone.layers.module import Config


class ReplacedSpatialConv(ResidualBlock):
    """A base to put before a block: ``spatial_cfg`` says the spatial convolution, ``conv_cfg`` the others.

    With None, the default, ``conv_cfg`` and ``dcn`` say all of them, as ever. It is set before the block is built.
    """

    spatial_cfg: Config | None = None

    def add_conv(self, index: int, *args: Any, deformable: bool = False, **kwargs: Any) -> None:
        """Add ``conv{index}`` and the norm behind it, as the base class does."""
        if deformable and self.spatial_cfg is not None:
            others, self.conv_cfg = self.conv_cfg, self.spatial_cfg
            super().add_conv(index, *args, **kwargs)
            self.conv_cfg = others
        else:
            super().add_conv(index, *args, deformable=deformable, **kwargs)
