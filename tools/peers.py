"""Libraries to compare with: how to import them, and their ResNet-50 with the feature maps of four stages."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Net = Callable[[Tensor], Any]

# Operators that torchvision declares in compiled code, which does not load beside a CPU-only torch.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declarations = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]  # the schemas live as long as it


def import_torchvision() -> ModuleType:
    """Import torchvision, whose classification models are plain PyTorch, also where its operators do not load.

    Importing it then fails while it registers fake kernels for two operators that those models never call. Declaring
    the two, without any kernel, is enough for the import.

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
    """The ResNet-50 of torchvision."""
    torchvision = import_torchvision()
    from torchvision.models._utils import IntermediateLayerGetter

    layers = {f"layer{stage}": str(stage) for stage in (1, 2, 3, 4)}
    net: Net = IntermediateLayerGetter(torchvision.models.resnet50(), layers).eval()
    return net


def timm_net() -> Net:
    """The ResNet-50 of timm."""
    import_torchvision()
    import timm

    net: Net = timm.create_model("resnet50", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    return net


def transformers_net() -> Net:
    """The ResNet-50 of Hugging Face."""
    import_torchvision()  # which transformers imports, too
    transformers: Any = importlib.import_module("transformers")
    config = transformers.ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
    net: Net = transformers.ResNetBackbone(config).eval()
    return net


def mmdet_net(**options: Any) -> Net:
    """The ResNet-50 of mmdet, with options of its own."""
    import_torchvision()  # which mmdet imports, too
    from mmdet.models.backbones import ResNet

    net: Any = ResNet(50, **options)
    net.eval()  # which returns nothing
    return net  # type: ignore[no-any-return]


PEERS: dict[str, Callable[[], Net]] = {
    "torchvision": torchvision_net,
    "timm": timm_net,
    "transformers": transformers_net,
    "mmdet": mmdet_net,
}
