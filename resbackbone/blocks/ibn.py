"""The blocks of IBN-Net: instance norm inside the branch, or behind the sum."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from resbackbone.blocks.base import ResidualBlock
from resbackbone.blocks.basic import BasicBlock
from resbackbone.blocks.bottleneck import Bottleneck
from resbackbone.blocks.resnext import ResNeXtBottleneck
from resbackbone.layers.ibn import IBN, make_instance_norm
from resbackbone.layers.module import Config


class InstanceNormBlock(ResidualBlock):
    """What puts instance norm into a block; named before the block class among a class's bases.

    Args:
        args: As for the block class.
        ibn: "a" for :class:`~resbackbone.layers.IBN` behind the first convolution; "b" for instance norm, called
            ``IN``, between the sum and its ReLU; None for neither.
        kwargs: As for the block class.

    Source: Pan et al., arXiv:1807.09441, figure 3.
    """

    def __init__(self, *args: Any, ibn: Literal["a", "b"] | None = None, **kwargs: Any) -> None:
        self.ibn = ibn
        super().__init__(*args, **kwargs)
        self.IN = make_instance_norm(self.planes * self.expansion, self.norm_cfg) if ibn == "b" else None

    def norm_cfg_at(self, index: int) -> Config:
        """Return the config of the ``index``-th norm, of which the first may be an IBN."""
        others = super().norm_cfg_at(index)
        if index > 1 or self.ibn != "a":
            return others
        return {"type": IBN, "norm_cfg": others, "requires_grad": others.get("requires_grad", True)}

    def _add_shortcut(self, x: Tensor) -> Tensor:
        out = super()._add_shortcut(x)
        return out if self.IN is None else self.IN(out)


class InstanceNormBasicBlock(InstanceNormBlock, BasicBlock):
    """A :class:`~resbackbone.blocks.BasicBlock` that may have instance norm."""


class InstanceNormBottleneck(InstanceNormBlock, Bottleneck):
    """A :class:`~resbackbone.blocks.Bottleneck` that may have instance norm."""


class InstanceNormResNeXtBottleneck(InstanceNormBlock, ResNeXtBottleneck):
    """A :class:`~resbackbone.blocks.ResNeXtBottleneck` that may have instance norm."""
