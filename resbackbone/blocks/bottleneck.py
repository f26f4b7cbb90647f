"""The block of ResNet-50 and deeper: 1x1, 3x3, 1x1."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from resbackbone.blocks.base import ResidualBlock


class Bottleneck(ResidualBlock):
    """1x1 to ``width`` channels, 3x3 at that width, 1x1 to ``planes * 4`` channels.

    Args:
        inplanes: Channels that come in.
        planes: A quarter of the channels that go out.
        width: Channels in the middle; None for ``planes``.
        groups: Groups of the 3x3.
        kwargs: As for :class:`~resbackbone.blocks.ResidualBlock`; plugins go ``after_conv1``, ``2`` or ``3``.

    Source: He et al., arXiv:1512.03385, figure 5 right; striding in the 3x3 ("pytorch", also called v1.5 or v1b) is
    the variant of facebook/fb.resnet.torch.
    """

    expansion: ClassVar[int] = 4
    num_convs: ClassVar[int] = 3

    def __init__(
        self, inplanes: int, planes: int, *args: Any, width: int | None = None, groups: int = 1, **kwargs: Any
    ) -> None:
        self.width = planes if width is None else width
        self.groups = groups
        super().__init__(inplanes, planes, *args, **kwargs)

    @property
    def norm3(self) -> nn.Module:
        """The norm behind the third convolution."""
        return self._norm(3)

    def _build(self) -> None:
        self.conv1_stride, self.conv2_stride = (1, self.stride) if self.style == "pytorch" else (self.stride, 1)
        self.add_conv(1, self.inplanes, self.width, 1, stride=self.conv1_stride)
        self.add_conv(
            2,
            self.width,
            self.width,
            3,
            stride=self.conv2_stride,
            padding=self.dilation,
            dilation=self.dilation,
            groups=self.groups,
            deformable=True,
        )
        self.add_conv(3, self.width, self.planes * self.expansion, 1)

    def channels_after(self, index: int) -> int:
        """Return the channels behind the ``index``-th convolution: ``width`` before the last."""
        return super().channels_after(index) if index == self.num_convs else self.width
