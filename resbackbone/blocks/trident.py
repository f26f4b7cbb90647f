"""The block of TridentNet: one bottleneck, run at several dilations side by side."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from typing_extensions import Unpack

from resbackbone.blocks.base import BlockOptions
from resbackbone.blocks.bottleneck import Bottleneck
from resbackbone.layers.activation_checkpointing import needs_backward, recompute_in_backward
from resbackbone.layers.module import Config
from resbackbone.layers.trident_conv import TridentConv2d


class TridentBottleneck(Bottleneck):
    """A bottleneck that accepts a list of feature maps as well, one per branch, each run at its branch's dilation.

    The branches share all weights, and the running statistics of the norms, which see one branch after the other.

    Args:
        inplanes: Input channels.
        planes: A quarter of the output channels.
        trident_dilations: Dilation of the 3x3 in each branch, in pixels.
        options: As for :class:`Bottleneck`; ``dilation`` is that of a single feature map, and there is no ``dcn``.

    Raises:
        TypeError, ValueError, KeyError: If an argument does not fit; nothing is built then.

    Source: Li et al., Scale-Aware Trident Networks for Object Detection, arXiv:1901.01892, section 4.1.
    """

    unsupported: ClassVar[tuple[str, ...]] = ("anti_aliasing", "ibn")

    def __init__(
        self, inplanes: int, planes: int, *, trident_dilations: Sequence[int], **options: Unpack[BlockOptions]
    ) -> None:
        if options.get("dcn") is not None:
            raise ValueError("`dcn` must be None in a trident block, whose 3x3 is the trident convolution")
        self.trident_dilations = tuple(trident_dilations)
        super().__init__(inplanes, planes, **options)

    def spatial_conv_cfg(self, stride: int) -> Config | None:
        """Return the config of the 3x3, which is always the trident convolution."""
        return {"type": TridentConv2d}

    def forward(self, x: Any, *, checkpointed: bool = False) -> Any:
        """Map ``(N, inplanes, H, W)`` to ``(N, planes * 4, H/stride, W/stride)``, or a list of such to a list."""
        branches = isinstance(x, list)
        if not branches:
            return super().forward(x, checkpointed=checkpointed)
        if self.with_cp and not checkpointed and needs_backward(x, [self]):
            return recompute_in_backward(partial(TridentBottleneck.forward, self, checkpointed=True), x, [self])
        # All the shortcuts before all the branches, as in mmdet: gradients are added up in the order of computation.
        shortcuts = x if self.downsample is None else [self.downsample(branch) for branch in x]
        outs = [self.relu(self.conv_norm(branch, self.conv1, self.norm1_name)) for branch in x]
        outs = self.forward_plugin(outs, self.after_conv1_plugin_names)
        outs = [
            self.relu(self.conv_norm(out, self.conv2, self.norm2_name, dilation=dilation))
            for out, dilation in zip(outs, self.trident_dilations, strict=True)
        ]
        outs = self.forward_plugin(outs, self.after_conv2_plugin_names)
        outs = [self.conv_norm(out, self.conv3, self.norm3_name) for out in outs]
        outs = self.forward_plugin(outs, self.after_conv3_plugin_names)
        if self.drop_path is not None:
            outs = [self.drop_path(out) for out in outs]
        return [self.relu(out + shortcut) for out, shortcut in zip(outs, shortcuts, strict=True)]

    def forward_plugin(self, x: Any, plugin_names: Sequence[str]) -> Any:
        """Run the named plugins one after the other, on every branch."""
        if not isinstance(x, list):
            return super().forward_plugin(x, plugin_names)
        return [super(TridentBottleneck, self).forward_plugin(branch, plugin_names) for branch in x]
