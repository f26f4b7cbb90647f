"""ResNet for images of 32x32 pixels: a stem that keeps the size."""

from __future__ import annotations

from torch import nn
from typing_extensions import Unpack

from resbackbone.backbones.options import GroupedResNetOptions
from resbackbone.backbones.resnet import ResNet
from resbackbone.layers import build_conv_layer, build_norm_layer
from resbackbone.registry import MODELS
from resbackbone.utils.validation import check_flag, convert_arguments


@MODELS.register_module()
class ResNet_CIFAR(ResNet):
    """ResNet behind a single 3x3 convolution of stride 1, without max pooling: strides 1, 2, 4, 8.

    Args:
        depth: As for :class:`ResNet`.
        options: As for :class:`ResNet`; ``deep_stem`` must stay False, since the stem is what makes this class.

    Raises:
        ValueError: If ``deep_stem`` is asked for.
        KeyError, TypeError, ValueError: As for :class:`ResNet`.

    Source: He et al., arXiv:1512.03385, section 4.2, for the stem; the stages stay those of ImageNet, as in kuangliu's
    pytorch-cifar and mmpretrain 1.2.0 ``models/backbones/resnet_cifar.py``.

    >>> ResNet_CIFAR(18).out_strides
    (1, 2, 4, 8)
    """

    @convert_arguments
    def __init__(self, depth: int, **options: Unpack[GroupedResNetOptions]) -> None:
        deep_stem = options.get("deep_stem", False)
        check_flag("deep_stem", deep_stem)
        if deep_stem:
            raise ValueError(
                f"`deep_stem` of {type(self).__name__} must be False, got {deep_stem!r}: its stem is one 3x3 "
                "convolution of stride 1; use ResNetV1c for the deep stem"
            )
        super().__init__(depth, **options)

    def _make_stem_layer(self, in_channels: int, stem_channels: int) -> None:
        """Add ``conv1``, ``norm1`` and ``relu``, and in place of the max pooling nothing."""
        self.conv1 = build_conv_layer(self.conv_cfg, in_channels, stem_channels, 3, padding=1, bias=False)
        self.norm1_name, norm1 = build_norm_layer(self.norm_cfg, stem_channels, postfix=1)
        self.add_module(self.norm1_name, norm1)
        self.relu = nn.ReLU(inplace=True)
        self.add_module("maxpool", nn.Identity())
