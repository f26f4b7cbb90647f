"""ResNet-50 of other libraries, with the feature maps of all four stages as output."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Net = Callable[[Tensor], Any]

# Operators that torchvision declares in compiled code, which does not load with a CPU-only torch.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declarations = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]  # the schemas live as long as it


def import_torchvision() -> ModuleType:
    """Import torchvision, also where its compiled operators do not load.

    The import then fails when it registers fake kernels for two operators. Its classification models never call them,
    so declaring the two without a kernel suffices.

    Raises:
        ModuleNotFoundError: If torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    for schema in _SCHEMAS:
        _declarations.define(schema)  # type: ignore[no-untyped-call]
    return importlib.import_module("torchvision")


def torchvision_net() -> Net:
    """Return torchvision's ResNet-50."""
    torchvision = import_torchvision()
    from torchvision.models._utils import IntermediateLayerGetter

    layers = {f"layer{stage}": str(stage) for stage in (1, 2, 3, 4)}
    net: Net = IntermediateLayerGetter(torchvision.models.resnet50(), layers).eval()
    return net


def timm_net() -> Net:
    """Return timm's ResNet-50."""
    import_torchvision()
    import timm

    net: Net = timm.create_model("resnet50", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    return net


def transformers_net() -> Net:
    """Return the ResNet-50 of Hugging Face transformers."""
    import_torchvision()  # transformers imports it
    transformers: Any = importlib.import_module("transformers")
    config = transformers.ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
    net: Net = transformers.ResNetBackbone(config).eval()
    return net


def mmdet_net(**options: Any) -> Net:
    """Return mmdet's ResNet-50, built with the given options."""
    import_torchvision()  # mmdet imports it
    from mmdet.models.backbones import ResNet

    net: Any = ResNet(50, **options)
    net.eval()  # returns None
    return net  # type: ignore[no-any-return]


PEERS: dict[str, Callable[[], Net]] = {
    "torchvision": torchvision_net,
    "timm": timm_net,
    "transformers": transformers_net,
    "mmdet": mmdet_net,
}
