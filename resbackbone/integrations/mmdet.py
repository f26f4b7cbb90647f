"""Importing this module makes plain ``type="ResNet"`` and its variants in mmdet's registry ours.

In a config: ``custom_imports = dict(imports=["resbackbone.integrations.mmdet"], allow_failed_imports=False)``.
"""

from __future__ import annotations

from resbackbone.integrations._hosts import FAMILY, replace_in_registry

replace_in_registry(
    "mmdet",
    FAMILY,
    install=(
        "`pip install onedl-mmengine onedl-mmcv onedl-mmdetection` or `pip install mmengine 'mmcv<2.2' mmdet`; "
        "mmcv must have its compiled operators, which mmcv-lite lacks"
    ),
)
