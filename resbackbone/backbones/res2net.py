"""Res2Net: bottlenecks that see several scales at once."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from typing_extensions import Unpack

from resbackbone.backbones.options import ResNetOptions
from resbackbone.backbones.resnet import ResNet
from resbackbone.backbones.resnet_v1 import ResNetV1d
from resbackbone.blocks.res2 import Bottle2neck, check_splits
from resbackbone.registry import MODELS
from resbackbone.utils.validation import convert_arguments


@MODELS.register_module()
class Res2Net(ResNetV1d):
    """ResNet whose bottlenecks have ``scales`` splits of ``base_width`` channels each.

    The deep stem and the pooling shortcuts of :class:`ResNetV1d` are what the authors call v1b; their first models
    have neither (``deep_stem=False, avg_down=False``).

    Args:
        depth: 50, 101 or 152.
        scales: Number of splits.
        base_width: Channels per split, and per group of it, in the first stage.
        groups: Groups of the 3x3s; more than 1 is Res2NeXt.
        pool_at_stride_1: Whether a stage whose first block does not stride (``layer1``, and dilated stages) pools the
            last split there over 3x3 pixels, stride 1. The authors' code, timm and mmpretrain do, so their weights
            need True; those of mmdet and mmseg need False, since they pass the split on.
        options: As for :class:`ResNetV1d`.

    Raises:
        KeyError, TypeError, ValueError: As for :class:`ResNet`; also if ``scales`` is below 2.

    Source: Gao et al., Res2Net: A New Multi-scale Backbone Architecture, arXiv:1904.01169; defaults as in mmdet 3.3.0
    ``models/backbones/res2net.py``.

    >>> [conv.out_channels for conv in Res2Net(50).layer1[0].convs]
    [26, 26, 26]
    """

    arch_settings: ClassVar[dict[int, tuple[Any, tuple[int, ...]]]] = {
        depth: (Bottle2neck, ResNet.arch_settings[depth][1]) for depth in (50, 101, 152)
    }

    _sizes: ClassVar[tuple[str, ...]] = ("groups", "base_width", "scales")

    @convert_arguments
    def __init__(
        self,
        depth: int,
        *,
        scales: int = 4,
        base_width: int = 26,
        groups: int = 1,
        pool_at_stride_1: bool = False,
        **options: Unpack[ResNetOptions],
    ) -> None:
        check_splits(scales, base_width, groups, pool_at_stride_1)
        self.scales = scales
        self.pool_at_stride_1 = pool_at_stride_1
        super().__init__(depth, groups=groups, base_width=base_width, **options)

    def make_res_layer(self, **kwargs: Any) -> nn.Module:
        """Make one stage, whose first block does not add its splits up."""
        kwargs.update(
            scales=self.scales,
            base_width=self.base_width,
            base_channels=self.base_channels,
            groups=self.groups,
            first_block={"stage_type": "stage", "pool_at_stride_1": self.pool_at_stride_1},
        )
        return super().make_res_layer(**kwargs)
