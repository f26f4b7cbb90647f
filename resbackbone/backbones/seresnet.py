"""SE-ResNet and SE-ResNeXt: squeeze-and-excitation at the end of every block's branch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from typing_extensions import Unpack

from resbackbone.backbones.options import GroupedResNetOptions
from resbackbone.backbones.resnet import ResNet
from resbackbone.backbones.resnext import ResNeXt
from resbackbone.layers import SELayer
from resbackbone.layers.module import Config
from resbackbone.registry import MODELS
from resbackbone.utils.validation import check_int, convert_arguments


@MODELS.register_module()
class SEResNet(ResNet):
    """ResNet with an :class:`~resbackbone.layers.SELayer` behind the last norm of each block.

    The layer is a plugin, ``se_layer``, that runs before the user's plugins of that position.

    Args:
        depth: As for :class:`~resbackbone.ResNet`.
        se_ratio: Reduction ratio of squeeze-and-excitation: channels per squeezed channel.
        options: As for :class:`ResNet`.

    Raises:
        KeyError, TypeError, ValueError: As for :class:`ResNet`.

    Source: Hu et al., Squeeze-and-Excitation Networks, arXiv:1709.01507, figure 3 and table 1; keys as in mmpretrain
    1.2.0 ``models/backbones/seresnet.py``.

    >>> SEResNet(50).layer1[0].se_layer.conv1.conv
    Conv2d(256, 16, kernel_size=(1, 1), stride=(1, 1))
    """

    @convert_arguments
    def __init__(self, depth: int, *, se_ratio: int = 16, **options: Unpack[GroupedResNetOptions]) -> None:
        check_int("se_ratio", se_ratio, low=1)
        self.se_ratio = se_ratio
        super().__init__(depth, **options)

    def make_res_layer(self, *, plugins: Sequence[Config] | None = None, **kwargs: Any) -> nn.Module:
        """Make one stage with squeeze-and-excitation in front of the plugins that were asked for."""
        se = {"cfg": {"type": SELayer, "ratio": self.se_ratio}, "position": f"after_conv{self.block.num_convs}"}
        return super().make_res_layer(plugins=[se, *(plugins or ())], **kwargs)


@MODELS.register_module()
class SEResNeXt(SEResNet):
    """ResNeXt with squeeze-and-excitation, like :class:`SEResNet`.

    Args:
        depth: As for :class:`~resbackbone.ResNeXt`.
        se_ratio: As for :class:`SEResNet`.
        options: As for :class:`ResNet`; ``groups`` is 32 unless given. (``width_per_group``, mmpretrain's name, is
            ``base_width``.)

    Source: Hu et al., Squeeze-and-Excitation Networks, arXiv:1709.01507, table 1.
    """

    arch_settings = ResNeXt.arch_settings

    @convert_arguments
    def __init__(self, depth: int, *, se_ratio: int = 16, **options: Unpack[GroupedResNetOptions]) -> None:
        options.setdefault("groups", 32)
        super().__init__(depth, se_ratio=se_ratio, **options)
