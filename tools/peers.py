"""Libraries to compare with, where importing them takes more than an import."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

# Operators that torchvision declares in compiled code, which does not load beside a CPU-only torch.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declarations = torch.library.Library("torchvision", "FRAGMENT")  # the schemas live as long as this object


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
        _declarations.define(schema)
    return importlib.import_module("torchvision")
