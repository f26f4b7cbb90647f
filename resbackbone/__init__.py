"""One ResNet backbone family for every detection and segmentation framework.

Importing the package alone loads nothing, so that ``resbackbone --help`` needs no torch; the first name used loads all.

>>> import torch
>>> from resbackbone import build_backbone
>>> net = build_backbone("resnet18", out_indices=(1, 3))
>>> [tuple(feature.shape) for feature in net(torch.zeros(1, 3, 64, 96))]
[(1, 128, 8, 12), (1, 512, 2, 3)]
>>> net.out_channels, net.out_strides
((128, 512), (8, 32))
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "MODELS",
    "DetectoRS_ResNeXt",
    "DetectoRS_ResNet",
    "FeatureInfo",
    "RegNet",
    "Res2Net",
    "ResNeSt",
    "ResNeXt",
    "ResNet",
    "ResNetAA",
    "ResNetIBN",
    "ResNetRS",
    "ResNetT",
    "ResNetV1b",
    "ResNetV1c",
    "ResNetV1d",
    "ResNetV2",
    "ResNet_CIFAR",
    "SEResNeXt",
    "SEResNet",
    "SKResNet",
    "SharedHead",
    "TridentResNet",
    "WideResNet",
    "build_backbone",
    "list_backbones",
]

_MODULES = ("backbones", "backbones.feature_info", "config", "registry")  # that define these names

if TYPE_CHECKING:
    from resbackbone.backbones import (
        DetectoRS_ResNet,
        DetectoRS_ResNeXt,
        RegNet,
        Res2Net,
        ResNeSt,
        ResNet,
        ResNet_CIFAR,
        ResNetAA,
        ResNetIBN,
        ResNetRS,
        ResNetT,
        ResNetV1b,
        ResNetV1c,
        ResNetV1d,
        ResNetV2,
        ResNeXt,
        SEResNet,
        SEResNeXt,
        SharedHead,
        SKResNet,
        TridentResNet,
        WideResNet,
    )
    from resbackbone.backbones.feature_info import FeatureInfo
    from resbackbone.config import build_backbone, list_backbones
    from resbackbone.registry import MODELS
else:

    def __getattr__(name: str) -> Any:
        """Import a public name, or a subpackage, when it is first used (PEP 562)."""
        if name in __all__:
            # All modules at once, so that MODELS lists every backbone whichever name is used first.
            for module in [importlib.import_module(f"{__name__}.{path}") for path in _MODULES]:
                globals().update({public: vars(module)[public] for public in __all__ if public in vars(module)})
            return globals()[name]
        if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
