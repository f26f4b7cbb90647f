"""ResNet-B, C and D: the same blocks behind other stems and shortcuts."""

from __future__ import annotations

from typing_extensions import Unpack

from resbackbone.backbones.options import GroupedResNetOptions
from resbackbone.backbones.resnet import ResNet
from resbackbone.registry import MODELS
from resbackbone.utils.validation import convert_arguments


@MODELS.register_module()
class ResNetV1b(ResNet):
    """Another name for :class:`ResNet`, whose ``style="pytorch"`` is what v1b (also v1.5) means: stride in the 3x3.

    Source: facebook/fb.resnet.torch; ResNet-B of arXiv:1812.01187, figure 2a.
    """


@MODELS.register_module()
class ResNetV1c(ResNet):
    """ResNet with the deep stem.

    Args:
        depth: As for :class:`ResNet`.
        options: As for :class:`ResNet`; ``deep_stem`` is True unless given.

    Source: ResNet-C of He et al., Bag of Tricks, arXiv:1812.01187, figure 2b.
    """

    @convert_arguments
    def __init__(self, depth: int, **options: Unpack[GroupedResNetOptions]) -> None:
        options.setdefault("deep_stem", True)
        super().__init__(depth, **options)


@MODELS.register_module()
class ResNetV1d(ResNetV1c):
    """ResNet with the deep stem and average pooling in the shortcuts.

    Args:
        depth: As for :class:`ResNet`.
        options: As for :class:`ResNetV1c`; ``avg_down`` is True unless given.

    Source: ResNet-D of He et al., Bag of Tricks, arXiv:1812.01187, figure 2c.
    """

    @convert_arguments
    def __init__(self, depth: int, **options: Unpack[GroupedResNetOptions]) -> None:
        options.setdefault("avg_down", True)
        super().__init__(depth, **options)
