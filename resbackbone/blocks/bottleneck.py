"""The block of ResNet-50 and deeper: 1x1, 3x3, 1x1."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from resbackbone.blocks.base import ResidualBlock
from resbackbone.layers.activation_checkpointing import needs_backward, recompute_in_backward


class Bottleneck(ResidualBlock):
    """1x1 to ``width`` channels, 3x3 at that width and with ``groups`` groups, 1x1 to ``planes * 4`` channels.

    Plugins go ``after_conv1``, ``after_conv2`` or ``after_conv3``.

    Source: He et al., arXiv:1512.03385, figure 5 right; striding in the 3x3 ("pytorch", also called v1.5 or v1b) is
    the variant of facebook/fb.resnet.torch.
    """

    expansion: ClassVar[int] = 4
    num_convs: ClassVar[int] = 3

    @property
    def norm3(self) -> nn.Module:
        """The norm behind the third convolution."""
        return self._norm(3)

    def _build(self) -> None:
        self.conv1_stride, self.conv2_stride = (1, self.stride) if self.style == "pytorch" else (self.stride, 1)
        self.add_conv(1, self.inplanes, self.width, 1, stride=self.conv1_stride)
        self.add_spatial_conv(self.width, self.conv2_stride, self.dilation)
        self.add_conv(3, self.width, self.planes * self.expansion, 1)

    def add_spatial_conv(self, channels: int, stride: int, dilation: int) -> None:
        """Add ``conv2``, from ``channels`` to as many; a subclass may add another layer in its place."""
        self.add_conv(
            *(2, channels, channels, 3),
            stride=stride,
            padding=dilation,
            dilation=dilation,
            groups=self.groups,
            deformable=True,
        )

    def forward(self, x: Tensor, *, checkpointed: bool = False) -> Tensor:
        """Map ``(N, inplanes, H, W)`` to ``(N, planes * expansion, H/stride, W/stride)``.

        Args:
            x: The input.
            checkpointed: Whether this call is already inside activation checkpointing, where ``with_cp`` is ignored.
        """
        if self.with_cp and not checkpointed and needs_backward(x, [self]):
            return recompute_in_backward(partial(Bottleneck.forward, self, checkpointed=True), x, [self])  # type: ignore[no-any-return]

        out: Tensor = self.relu(self.conv_norm(x, self.conv1, self.norm1_name))
        if self.after_conv1_plugin_names:
            out = self.forward_plugin(out, self.after_conv1_plugin_names)

        if self.norm2_name is None:  # a layer with norms and activations of its own
            out = self.conv2(out)
        else:
            out = self.relu(self.conv_norm(out, self.conv2, self.norm2_name))
        if self.after_conv2_plugin_names:
            out = self.forward_plugin(out, self.after_conv2_plugin_names)

        if self.after_conv3_plugin_names or self.drop_path is not None or self.has_own_add:
            out = self.conv_norm(out, self.conv3, self.norm3_name)
            out = self.finish_branch(out, self.after_conv3_plugin_names)
            # Computed last, so that `optimize` can fuse the sum with the shortcut's convolution.
            out = self.join(out, x if self.downsample is None else self.downsample(x))
        else:
            shortcut = x if self.downsample is None else self.downsample(x)
            out = self.conv_norm(out, self.conv3, self.norm3_name, shortcut)
        if self.IN is not None:
            out = self.IN(out)
        return self.relu(out)
