"""The block of TridentNet: one bottleneck, run at several dilations side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from resbackbone.blocks.bottleneck import Bottleneck
from resbackbone.layers.conv_norm import conv_norm
from resbackbone.layers.module import Config
from resbackbone.layers.trident_conv import TridentConv2d


class TridentBottleneck(Bottleneck):
    """A bottleneck that takes a list of feature maps as well, one per branch, and runs each at its branch's dilation.

    The branches share all weights, and the running statistics of the norms, which see one branch after the other.

    Args:
        inplanes: Channels that come in.
        planes: A quarter of the channels that go out.
        trident_dilations: Dilation of the 3x3 in each branch, in pixels.
        kwargs: As for :class:`Bottleneck`; ``dilation`` is that of a single feature map, and there is no ``dcn``.

    Raises:
        TypeError, ValueError, KeyError: If an argument does not fit; nothing is built then.

    Source: Li et al., Scale-Aware Trident Networks for Object Detection, arXiv:1901.01892, section 4.1.
    """

    conv2: TridentConv2d

    def __init__(self, inplanes: int, planes: int, *, trident_dilations: Sequence[int], **kwargs: Any) -> None:
        if kwargs.get("dcn") is not None:
            raise ValueError("`dcn` must be None in a trident block, whose 3x3 is the trident convolution")
        self.trident_dilations = tuple(trident_dilations)
        super().__init__(inplanes, planes, **kwargs)

    def spatial_conv_cfg(self, stride: int) -> Config | None:
        """Return the config of the 3x3, which is always the trident convolution."""
        return {"type": TridentConv2d}

    def forward(self, x: Any) -> Any:
        """Map ``(N, inplanes, H, W)`` to ``(N, planes * 4, H/stride, W/stride)``, or a list of such to a list."""
        branched = isinstance(x, list)
        if not branched:
            return super().forward(x)
        return [self.relu(branch) for branch in self.residual(x)]

    def _add_shortcut(self, x: Any) -> Any:
        branched = isinstance(x, list)
        if not branched:
            return super()._add_shortcut(x)
        # All the shortcuts before all the branches, as in mmdet: gradients are added up in the order of computation.
        shortcuts = x if self.downsample is None else [self.downsample(branch) for branch in x]
        outs: Any = self.branch(x)
        if self.drop_path is not None:
            outs = [self.drop_path(out) for out in outs]
        return [out + shortcut for out, shortcut in zip(outs, shortcuts, strict=True)]

    def step(self, index: int, x: Any) -> Any:
        """Run the ``index``-th convolution with its norm and ReLU, the second at each branch's dilation."""
        if not isinstance(x, list):
            return super().step(index, x)
        if index != 2:
            return [super(TridentBottleneck, self).step(index, branch) for branch in x]
        at_dilations = zip(x, self.trident_dilations, strict=True)
        normed = [conv_norm(branch, self.conv2, self.norm2, dilation) for branch, dilation in at_dilations]
        return [self.relu(branch) for branch in normed]

    def forward_plugin(self, x: Any, plugin_names: Sequence[str]) -> Any:
        """Run the named plugins one after the other, on every branch; the shapes stay."""
        if not isinstance(x, list):
            return super().forward_plugin(x, plugin_names)
        return [super(TridentBottleneck, self).forward_plugin(branch, plugin_names) for branch in x]
