"""IBN-Net: ResNets whose early stages normalize each image by itself, which removes style."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn
from typing_extensions import Unpack

from resbackbone.backbones.options import GroupedResNetOptions
from resbackbone.backbones.resnet import ResNet
from resbackbone.layers.ibn import make_instance_norm
from resbackbone.registry import MODELS
from resbackbone.utils.validation import check_choice, convert_arguments


@MODELS.register_module()
class ResNetIBN(ResNet):
    """ResNet with instance norm in its early stages. Its keys are those of XingangPan/IBN-Net.

    IBN-a normalizes half of the channels behind each first convolution of the first three stages by instance. IBN-b
    normalizes so in the stem, in place of batch norm, and behind the last sum of the first two stages.

    Args:
        depth: As for :class:`~resbackbone.ResNet`.
        ibn: "a" or "b".
        options: As for :class:`~resbackbone.ResNet`; "b" has no deep stem.

    Raises:
        ValueError: If ``ibn`` is neither, or "b" meets ``deep_stem``; otherwise as :class:`~resbackbone.ResNet`.

    Source: Pan et al., Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net, arXiv:1807.09441,
    section 3.2; which stages, as in XingangPan/IBN-Net ``ibnnet/resnet_ibn.py``.

    >>> norm = ResNetIBN(50).layer3[0].bn1
    >>> norm.IN.num_features, norm.BN.num_features
    (128, 128)
    """

    @convert_arguments
    def __init__(self, depth: int, *, ibn: Literal["a", "b"] = "a", **options: Unpack[GroupedResNetOptions]) -> None:
        check_choice("ibn", ibn, ("a", "b"))
        if ibn == "b" and options.get("deep_stem") is True:
            raise ValueError("`ibn`='b' normalizes behind the stem's one convolution; leave `deep_stem` out")
        self.ibn = ibn
        super().__init__(depth, **options)

    def _make_plain_stem(self, in_channels: int, stem_channels: int, kernel_size: int) -> None:
        """Add ``conv1``, ``norm1`` and ``relu``; with IBN-b the norm is instance norm under the same name."""
        super()._make_plain_stem(in_channels, stem_channels, kernel_size)
        if self.ibn == "b":
            self.add_module(self.norm1_name, make_instance_norm(stem_channels, self.norm_cfg))

    def make_res_layer(self, **kwargs: Any) -> nn.Module:
        """Make one stage, with instance norm if it is an early one."""
        index = len(self.res_layers)
        if self.ibn == "a" and index < 3:
            kwargs["ibn"] = "a"
        elif self.ibn == "b" and index < 2:
            kwargs["last_block"] = {"ibn": "b"}
        return super().make_res_layer(**kwargs)
