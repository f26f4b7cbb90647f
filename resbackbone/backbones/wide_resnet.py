"""Wide ResNet: bottlenecks with a wider 3x3."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from typing_extensions import Unpack

from resbackbone.backbones.options import ResNetOptions
from resbackbone.backbones.resnet import ResNet
from resbackbone.layers.arguments import MAX_PARTS
from resbackbone.registry import MODELS
from resbackbone.utils.validation import check_count, convert_arguments


@MODELS.register_module()
class WideResNet(ResNet):
    """ResNet whose bottlenecks are ``widening_factor`` times as wide in the middle; their outputs stay the same.

    Args:
        depth: 50, 101 or 152.
        widening_factor: Channels of the 3x3 per ``planes``; the paper's k.
        options: As for :class:`~resbackbone.ResNet`.

    Source: Zagoruyko and Komodakis, Wide Residual Networks, arXiv:1605.07146, table 8 (WRN-50-2-bottleneck);
    torchvision's ``wide_resnet50_2``.

    >>> WideResNet(50).layer1[0].conv2.out_channels
    128
    """

    arch_settings: ClassVar[dict[int, tuple[Any, tuple[int, ...]]]] = {
        depth: ResNet.arch_settings[depth] for depth in (50, 101, 152)
    }

    _sizes: ClassVar[tuple[str, ...]] = ("widening_factor",)

    @convert_arguments
    def __init__(self, depth: int, *, widening_factor: int = 2, **options: Unpack[ResNetOptions]) -> None:
        check_count("widening_factor", widening_factor, most=MAX_PARTS)
        self.widening_factor = widening_factor
        super().__init__(depth, **options)

    def make_res_layer(self, **kwargs: Any) -> nn.Module:
        """Make one stage of widened bottlenecks."""
        return super().make_res_layer(width=kwargs["planes"] * self.widening_factor, **kwargs)
