"""Registers this library's backbones under plain names (``type="ResNet"``, ...) in mmdet on import.

In a config: ``custom_imports = dict(imports=["resbackbone.integrations.mmdet"], allow_failed_imports=False)``.
It also makes mmcv's compiled operators accept feature maps in any memory format.
``"ResLayer"`` in that registry is the shared head of C4 detectors, :class:`resbackbone.backbones.SharedHead`.
"""

from __future__ import annotations

from resbackbone import backbones
from resbackbone.integrations._hosts import replace_in_registry
from resbackbone.integrations._mmcv import guard_operators

_BACKBONES = (
    backbones.ResNet,
    backbones.ResNetV1b,
    backbones.ResNetV1c,
    backbones.ResNetV1d,
    backbones.ResNeXt,
    backbones.WideResNet,
    backbones.RegNet,
    backbones.Res2Net,
    backbones.ResNeSt,
    backbones.DetectoRS_ResNet,
    backbones.DetectoRS_ResNeXt,
    backbones.TridentResNet,
)

replace_in_registry(
    "mmdet",
    {backbone.__name__: backbone for backbone in _BACKBONES} | {"ResLayer": backbones.SharedHead},
    install=(
        "`pip install onedl-mmengine onedl-mmcv onedl-mmdetection` or `pip install mmengine 'mmcv<2.2' mmdet`; "
        "mmcv must have its compiled operators, which mmcv-lite lacks"
    ),
)
guard_operators()
