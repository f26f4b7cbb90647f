"""The blocks of ResNet v2: norm and ReLU come before each convolution, nothing behind the sum."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from resbackbone.blocks.base import ResidualBlock
from resbackbone.blocks.basic import BasicBlock
from resbackbone.blocks.bottleneck import Bottleneck
from resbackbone.layers import build_conv_layer
from resbackbone.layers.activation_checkpointing import needs_backward, recompute_in_backward


class PreActBlock(ResidualBlock):
    """The base class of blocks with pre-activation: ``norm{i}`` is in front of ``conv{i}``.

    The projection of the shortcut has the branch's input, behind the first norm and ReLU, and no norm of its own.
    Plugins go behind the norm and ReLU that follow a convolution, or behind the last convolution.

    Source: He et al., Identity Mappings in Deep Residual Networks, arXiv:1603.05027, figure 1 (b); the shortcut as in
    its authors' code and in timm.
    """

    unsupported: ClassVar[tuple[str, ...]] = ("anti_aliasing", "ibn")

    def add_conv(self, index: int, in_channels: int, out_channels: int, kernel_size: int, **geometry: Any) -> None:
        """Add ``conv{index}`` and the norm in front of it; arguments as for :class:`ResidualBlock`."""
        self.add_norm(index, in_channels)
        cfg = self.spatial_conv_cfg(geometry.get("stride", 1)) if geometry.pop("deformable", False) else self.conv_cfg
        conv = build_conv_layer(cfg, in_channels, out_channels, kernel_size, bias=False, **geometry)
        self.add_module(f"conv{index}", conv)

    def add(self, out: Tensor, shortcut: Tensor) -> Tensor:
        """Add the shortcut to the branch's output, which a convolution may have kept for the backward pass."""
        return out + shortcut


class PreActBasicBlock(PreActBlock, BasicBlock):
    """A :class:`~resbackbone.blocks.BasicBlock` with pre-activation."""

    def forward(self, x: Tensor, *, checkpointed: bool = False) -> Tensor:
        """Map ``(N, inplanes, H, W)`` to ``(N, planes, H/stride, W/stride)``."""
        if self.with_cp and not checkpointed and needs_backward(x, [self]):
            return recompute_in_backward(partial(PreActBasicBlock.forward, self, checkpointed=True), x, [self])  # type: ignore[no-any-return]
        activated = self.relu(self.norm1(x))
        out: Tensor = self.relu(self.conv_norm(activated, self.conv1, self.norm2_name))
        out = self.forward_plugin(out, self.after_conv1_plugin_names)
        out = self.finish_branch(self.conv2(out), self.after_conv2_plugin_names)
        return self.join(out, x if self.downsample is None else self.downsample(activated))


class PreActBottleneck(PreActBlock, Bottleneck):
    """A :class:`~resbackbone.blocks.Bottleneck` with pre-activation."""

    def forward(self, x: Tensor, *, checkpointed: bool = False) -> Tensor:
        """Map ``(N, inplanes, H, W)`` to ``(N, planes * expansion, H/stride, W/stride)``."""
        if self.with_cp and not checkpointed and needs_backward(x, [self]):
            return recompute_in_backward(partial(PreActBottleneck.forward, self, checkpointed=True), x, [self])  # type: ignore[no-any-return]
        activated = self.relu(self.norm1(x))
        out: Tensor = self.relu(self.conv_norm(activated, self.conv1, self.norm2_name))
        out = self.forward_plugin(out, self.after_conv1_plugin_names)
        out = self.relu(self.conv_norm(out, self.conv2, self.norm3_name))
        out = self.forward_plugin(out, self.after_conv2_plugin_names)
        out = self.finish_branch(self.conv3(out), self.after_conv3_plugin_names)
        return self.join(out, x if self.downsample is None else self.downsample(activated))
