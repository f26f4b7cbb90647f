"""Importing this module makes plain ``type="ResNet"`` and its variants in mmseg's registry ours, with mmseg's defaults.

In a config: ``custom_imports = dict(imports=["resbackbone.integrations.mmseg"], allow_failed_imports=False)``. The
classes are here too, for a subclass that was written for mmseg's ResNet.
"""

from __future__ import annotations

from typing import Any, cast

from resbackbone import backbones
from resbackbone.integrations._hosts import FAMILY, replace_in_registry

__all__ = ["ResNeXt", "ResNet", "ResNetV1b", "ResNetV1c", "ResNetV1d", "WideResNet"]


class MmsegDefaults(backbones.ResNet):
    """The constructor that mmseg's configs expect; it goes before a backbone in the list of base classes.

    Args:
        depth: As for :class:`resbackbone.ResNet`.
        stem_channels: 64 here, whatever ``base_channels`` is.
        norm_eval: False here: batch norms follow the batch, as semantic segmentation trains them.
        kwargs: As for the backbone.
    """

    def __init__(self, depth: int, *, stem_channels: int | None = 64, norm_eval: bool = False, **kwargs: Any) -> None:
        super().__init__(depth, stem_channels=stem_channels, norm_eval=norm_eval, **kwargs)


def _with_mmseg_defaults(backbone: type[backbones.ResNet]) -> type[backbones.ResNet]:
    """Derive a class of the same name that differs in its defaults only.

    Its module attribute must have that name too, or what is built from it could not be pickled.
    """
    doc = f":class:`resbackbone.{backbone.__name__}` with mmseg's defaults, ``stem_channels=64, norm_eval=False``."
    namespace = {"__module__": __name__, "__doc__": doc}
    return cast("type[backbones.ResNet]", type(backbone.__name__, (MmsegDefaults, backbone), namespace))


ResNet = _with_mmseg_defaults(backbones.ResNet)
ResNetV1b = _with_mmseg_defaults(backbones.ResNetV1b)
ResNetV1c = _with_mmseg_defaults(backbones.ResNetV1c)
ResNetV1d = _with_mmseg_defaults(backbones.ResNetV1d)
ResNeXt = _with_mmseg_defaults(backbones.ResNeXt)
WideResNet = _with_mmseg_defaults(backbones.WideResNet)

replace_in_registry(
    "mmseg",
    [globals()[backbone.__name__] for backbone in FAMILY],
    install=(
        "`pip install onedl-mmengine onedl-mmcv onedl-mmsegmentation ftfy regex` or "
        "`pip install mmengine 'mmcv<2.2' mmsegmentation ftfy regex`"
    ),
)
