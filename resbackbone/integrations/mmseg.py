"""Registers this library's backbones under plain names (``type="ResNet"``, ...) in mmseg on import.

In a config: ``custom_imports = dict(imports=["resbackbone.integrations.mmseg"], allow_failed_imports=False)``. The
classes have mmseg's defaults; subclasses written for mmseg's ResNet can derive from them.
"""

from __future__ import annotations

from typing import Any

from resbackbone import backbones
from resbackbone.integrations._hosts import replace_in_registry
from resbackbone.integrations._mmcv import guard_operators


class MmsegDefaults(backbones.ResNet):
    """Mixin with mmseg's defaults; it precedes the backbone in the base classes.

    Args:
        depth: As for :class:`resbackbone.ResNet`.
        stem_channels: 64 by default, independent of ``base_channels``.
        norm_eval: False by default: batch norms use batch statistics, as in semantic segmentation.
        kwargs: As for the backbone.
    """

    def __init__(self, depth: int, *, stem_channels: int | None = 64, norm_eval: bool = False, **kwargs: Any) -> None:
        super().__init__(depth, stem_channels=stem_channels, norm_eval=norm_eval, **kwargs)


class ResNet(MmsegDefaults):
    """:class:`resbackbone.ResNet` with mmseg's defaults, ``stem_channels=64, norm_eval=False``."""


class ResNetV1b(MmsegDefaults, backbones.ResNetV1b):
    """:class:`resbackbone.ResNetV1b` with mmseg's defaults, ``stem_channels=64, norm_eval=False``."""


class ResNetV1c(MmsegDefaults, backbones.ResNetV1c):
    """:class:`resbackbone.ResNetV1c` with mmseg's defaults, ``stem_channels=64, norm_eval=False``."""


class ResNetV1d(MmsegDefaults, backbones.ResNetV1d):
    """:class:`resbackbone.ResNetV1d` with mmseg's defaults, ``stem_channels=64, norm_eval=False``."""


class ResNeXt(MmsegDefaults, backbones.ResNeXt):
    """:class:`resbackbone.ResNeXt` with mmseg's defaults, ``stem_channels=64, norm_eval=False``."""


class WideResNet(MmsegDefaults, backbones.WideResNet):
    """:class:`resbackbone.WideResNet` with mmseg's defaults, ``stem_channels=64, norm_eval=False``."""


class ResNeSt(MmsegDefaults, backbones.ResNeSt):
    """:class:`resbackbone.ResNeSt` with mmseg's defaults, ``stem_channels=64, norm_eval=False``."""


__all__ = ["ResNeSt", "ResNeXt", "ResNet", "ResNetV1b", "ResNetV1c", "ResNetV1d", "WideResNet"]

replace_in_registry(
    "mmseg",
    {name: globals()[name] for name in __all__},
    install=(
        "`pip install onedl-mmengine onedl-mmcv onedl-mmsegmentation ftfy regex` or "
        "`pip install mmengine 'mmcv<2.2' mmsegmentation ftfy regex`"
    ),
)
guard_operators()
