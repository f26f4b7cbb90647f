"""ResNeXt: grouped convolutions in the bottlenecks."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from resbackbone.backbones.resnet import ResNet
from resbackbone.blocks import ResNeXtBottleneck
from resbackbone.layers.arguments import MAX_CHANNELS, MAX_PARTS
from resbackbone.registry import MODELS
from resbackbone.utils.validation import check_count, convert_arguments


@MODELS.register_module()
class ResNeXt(ResNet):
    """ResNet whose bottlenecks have ``groups`` groups of ``base_width`` channels.

    Args:
        depth: 26, 50, 101 or 152.
        groups: Groups of the 3x3, the paper's cardinality; 1 is a plain ResNet.
        base_width: Channels per group in the first stage.
        kwargs: As for :class:`~resbackbone.ResNet`.

    Source: Xie et al., Aggregated Residual Transformations for Deep Neural Networks, arXiv:1611.05431.

    >>> ResNeXt(50, groups=32, base_width=4).layer1[0].conv2
    Conv2d(128, 128, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=32, bias=False)
    """

    arch_settings: ClassVar[dict[int, tuple[Any, tuple[int, ...]]]] = {
        depth: (ResNeXtBottleneck, ResNet.arch_settings[depth][1]) for depth in (26, 50, 101, 152)
    }

    _sizes: ClassVar[tuple[str, ...]] = ("groups", "base_width")

    @convert_arguments
    def __init__(self, depth: int, *, groups: int = 1, base_width: int = 4, **kwargs: Any) -> None:
        check_count("groups", groups, most=MAX_PARTS)
        check_count("base_width", base_width, most=MAX_CHANNELS)
        self.groups = groups
        self.base_width = base_width
        super().__init__(depth, **kwargs)

    def make_res_layer(self, **kwargs: Any) -> nn.Module:
        """Make one stage of grouped bottlenecks."""
        return super().make_res_layer(
            groups=self.groups, base_width=self.base_width, base_channels=self.base_channels, **kwargs
        )
