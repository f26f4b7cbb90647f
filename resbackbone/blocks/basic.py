"""The block of ResNet-18 and 34: two 3x3 convolutions."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from torch import Tensor

from resbackbone.blocks.base import ResidualBlock
from resbackbone.layers.activation_checkpointing import needs_backward, recompute_in_backward


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions; the first strides and dilates, the second may be deformable.

    Plugins go ``after_conv1`` or ``after_conv2``. Dilating the first convolution only is what OpenMMLab does; with
    ``stage_dilation`` the second is dilated, too, as in timm. There are no groups, and no ``width``.

    Source: He et al., arXiv:1512.03385, figure 5 left.
    """

    expansion: ClassVar[int] = 1
    num_convs: ClassVar[int] = 2

    def _build(self) -> None:
        if self.groups != 1 or self.width != self.planes:
            raise ValueError(
                f"`groups` and `width` of a {type(self).__name__} must be 1 and None, got {self.groups} and "
                f"{self.width}; they are for bottlenecks"
            )
        dilation, second = self.dilation, self.stage_dilation
        self.add_conv(1, self.inplanes, self.planes, 3, stride=self.stride, padding=dilation, dilation=dilation)
        self.add_conv(2, self.planes, self.planes, 3, padding=second, dilation=second, deformable=True)

    def forward(self, x: Tensor, *, checkpointed: bool = False) -> Tensor:
        """Map ``(N, inplanes, H, W)`` to ``(N, planes, H/stride, W/stride)``.

        Args:
            x: The input.
            checkpointed: Whether this call is already inside activation checkpointing, where ``with_cp`` is ignored.
        """
        if self.with_cp and not checkpointed and needs_backward(x, [self]):
            return recompute_in_backward(partial(BasicBlock.forward, self, checkpointed=True), x, [self])  # type: ignore[no-any-return]

        if self.norm1_name is None:  # a layer with norms and activations of its own
            out: Tensor = self.conv1(x)
        else:
            out = self.relu(self.conv_norm(x, self.conv1, self.norm1_name))
        if self.after_conv1_plugin_names:
            out = self.forward_plugin(out, self.after_conv1_plugin_names)

        if self.after_conv2_plugin_names or self.drop_path is not None or self.has_own_add:
            out = self.conv_norm(out, self.conv2, self.norm2_name)
            out = self.finish_branch(out, self.after_conv2_plugin_names)
            # Computed last, so that `optimize` can fuse the sum with the shortcut's convolution.
            out = self.join(out, x if self.downsample is None else self.downsample(x))
        else:
            shortcut = x if self.downsample is None else self.downsample(x)
            out = self.conv_norm(out, self.conv2, self.norm2_name, shortcut)
        if self.IN is not None:
            out = self.IN(out)
        return self.relu(out)
