"""Anti-aliased ResNets: a low-pass filter at each stride, except in shortcuts."""

from __future__ import annotations

from typing import Any, get_args

from torch import nn
from typing_extensions import Unpack

from resbackbone.backbones.options import GroupedResNetOptions
from resbackbone.backbones.resnet import ResNet
from resbackbone.layers.blur_pool import AntiAliasing, make_downsampling
from resbackbone.registry import MODELS
from resbackbone.utils.validation import check_choice, convert_arguments


@MODELS.register_module()
class ResNetAA(ResNet):
    """ResNet that downsamples by low-pass filters.

    The convolution that would stride does not, and a filter behind its ReLU does. In the stem, "blur" puts a filter
    behind a max pooling that does not stride, and "average" averages in place of the max pooling. The shortcuts stay
    as they are, strided or with ``avg_down`` averaged. With ``fallback_on_stride`` every convolution may be
    deformable, since none strides.

    Args:
        depth: As for :class:`~resbackbone.ResNet`.
        anti_aliasing: "blur" for :class:`~resbackbone.layers.BlurPool2d`, "average" for the mean of 2x2 pixels.
        options: As for :class:`~resbackbone.ResNet`.

    Raises:
        ValueError: If ``anti_aliasing`` is neither; otherwise as :class:`~resbackbone.ResNet`.

    Source: Zhang, Making Convolutional Networks Shift-Invariant Again, arXiv:1904.11486, section 3.3. timm's
    ``resnetblur`` and, with the average, ``resnetaa``; those accept only sides that are multiples of 32 pixels.

    >>> ResNetAA(18).layer2[0].low_pass1
    BlurPool2d(128, kernel_size=3, stride=2, padding_mode='reflect')
    """

    @convert_arguments
    def __init__(
        self, depth: int, *, anti_aliasing: AntiAliasing = "blur", **options: Unpack[GroupedResNetOptions]
    ) -> None:
        check_choice("anti_aliasing", anti_aliasing, get_args(AntiAliasing))
        self.anti_aliasing = anti_aliasing
        super().__init__(depth, **options)

    def _make_stem_layer(self, in_channels: int, stem_channels: int) -> None:
        """Add the layers before the first stage; the pooling filters."""
        super()._make_stem_layer(in_channels, stem_channels)
        self.maxpool = make_downsampling(self.anti_aliasing, stem_channels, stride=2)
        if self.anti_aliasing == "blur":
            self.maxpool = nn.Sequential(nn.MaxPool2d(kernel_size=3, stride=1, padding=1), self.maxpool)

    def make_res_layer(self, **kwargs: Any) -> nn.Module:
        """Make one stage of anti-aliased blocks."""
        return super().make_res_layer(anti_aliasing=self.anti_aliasing, **kwargs)
