"""The blocks of ResNet v2: norm and ReLU come before each convolution, nothing behind the sum."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from resbackbone.blocks.base import ResidualBlock
from resbackbone.blocks.basic import BasicBlock
from resbackbone.blocks.bottleneck import Bottleneck
from resbackbone.layers.conv_norm import conv_norm


class PreActivation(ResidualBlock):
    """``branch(relu(norm1(x))) + shortcut``; named before the block class among a class's bases.

    The shortcut is ``x``, or ``downsample`` of what the branch gets, too, which has no norm of its own. In the branch
    norm and ReLU of the next convolution follow each but the last; plugins come behind them.

    Args:
        args: As for the block class.
        kwargs: As for the block class.

    Source: He et al., Identity Mappings in Deep Residual Networks, arXiv:1603.05027, figure 1 (b); the shortcut as in
    its authors' code and in timm.
    """

    def add_conv(self, index: int, in_channels: int, *args: Any, **kwargs: Any) -> None:
        """Add ``conv{index}`` and the norm in front of it."""
        self.add_norm(index, in_channels)
        self.add_module(f"conv{index}", self.make_conv(in_channels, *args, **kwargs))

    def step(self, index: int, x: Tensor) -> Tensor:
        """Run the ``index``-th convolution and, but for the last, norm and ReLU of the next."""
        conv = getattr(self, f"conv{index}")
        if index == self.num_convs:
            return conv(x)  # type: ignore[no-any-return]
        return self.relu(conv_norm(x, conv, self._norm(index + 1)))  # type: ignore[no-any-return]

    def before_branch(self, x: Tensor) -> Tensor:
        """Compute the first norm and its ReLU, which come before branch and projection alike."""
        activated: Tensor = self.relu(self.norm1(x))
        return activated

    def add(self, out: Tensor, shortcut: Tensor) -> Tensor:
        """Add the shortcut to the branch's output, which a convolution may have kept for the backward pass."""
        return out + shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, inplanes, H, W)`` to ``(N, planes * expansion, H/stride, W/stride)``."""
        return self.residual(x)  # type: ignore[no-any-return]


class PreActBasicBlock(PreActivation, BasicBlock):
    """A :class:`~resbackbone.blocks.BasicBlock` with pre-activation."""


class PreActBottleneck(PreActivation, Bottleneck):
    """A :class:`~resbackbone.blocks.Bottleneck` with pre-activation."""
