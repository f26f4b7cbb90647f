"""The block of ResNet-18 and 34: two 3x3 convolutions."""

from __future__ import annotations

from typing import ClassVar

from resbackbone.blocks.base import ResidualBlock


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions; the first strides and dilates, the second may be deformable.

    Plugins go ``after_conv1`` or ``after_conv2``. Dilating the first convolution only is what OpenMMLab does; with
    ``stage_dilation`` the second is dilated, too, as in timm.

    Source: He et al., arXiv:1512.03385, figure 5 left.
    """

    expansion: ClassVar[int] = 1
    num_convs: ClassVar[int] = 2

    def _build(self) -> None:
        self.add_conv(
            1, self.inplanes, self.planes, 3, stride=self.stride, padding=self.dilation, dilation=self.dilation
        )
        further = self.stage_dilation
        self.add_conv(2, self.planes, self.planes, 3, padding=further, dilation=further, deformable=True)
