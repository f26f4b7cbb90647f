"""Every kind of module that has an ``init_cfg``, every spelling of a checkpoint in one, and a pickle that runs code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile_configs import TINY
from mmengine.model import BaseModule, PretrainedInit
from mmengine.registry import MODELS as ROOT_MODELS
from torch import Tensor, nn

from resbackbone import MODELS, ResNet, SharedHead
from resbackbone.backbones.res_layer import ResLayer
from resbackbone.blocks import BasicBlock, Bottleneck
from resbackbone.layers import Module
from resbackbone.layers.sequential import Sequential
from resbackbone.necks import FPN
from resbackbone.training.classification import ImageClassifier


@MODELS.register_module(name="tests.ThirdPartyPlugin")
class ThirdPartyPlugin(BaseModule):  # type: ignore[misc]  # mmengine ships no types
    """A plugin derived from mmengine's BaseModule, which would load any checkpoint that it names."""

    def __init__(self, in_channels: int, init_cfg: Any = None) -> None:
        super().__init__(init_cfg)
        self.conv = nn.Conv2d(in_channels, in_channels, 1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv(x)
        return out


class ThirdPartyHolder(BaseModule):  # type: ignore[misc]
    """A module that has mmengine build another one."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = ROOT_MODELS.build(inner)


def plugged(init_cfg: Any) -> ResNet:
    cfg = {"type": ThirdPartyPlugin, "init_cfg": init_cfg}
    return ResNet(50, base_channels=4, plugins=[{"cfg": cfg, "position": "after_conv2"}])


def fpn(init_cfg: Any) -> FPN:
    return FPN([4, 8], 4, 2, init_cfg=init_cfg)


# Modules with an `init_cfg`, not yet initialized.
MODULES: dict[str, Callable[[Any], nn.Module]] = {
    "ResNet": lambda init_cfg: ResNet(18, base_channels=4, init_cfg=init_cfg),
    "DetectoRS": lambda init_cfg: MODELS.build({**TINY, "type": "DetectoRS_ResNet", "init_cfg": init_cfg}),
    "SharedHead": lambda init_cfg: SharedHead(18, stage=1, init_cfg=init_cfg),
    "FPN": fpn,
    "ImageClassifier": lambda init_cfg: ImageClassifier(
        {"type": "ResNet", "depth": 18, "base_channels": 4}, num_classes=2, init_cfg=init_cfg
    ),
    "its backbone": lambda init_cfg: ImageClassifier(
        {"type": "ResNet", "depth": 18, "base_channels": 4, "init_cfg": init_cfg}, num_classes=2
    ),
    "ResLayer": lambda init_cfg: ResLayer(BasicBlock, 4, 4, 1, init_cfg=init_cfg),
    "Bottleneck": lambda init_cfg: Bottleneck(4, 1, init_cfg=init_cfg),
    "Sequential": lambda init_cfg: Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), init_cfg=init_cfg),
    "a plugin of mmengine's kind": plugged,
    "Module": Module,
}
PATH = "mmengine.model.weight_init.PretrainedInit"
PRETRAINED_CONFIGS: dict[str, Callable[[Any], Any]] = {
    "Pretrained": lambda file: {"type": "Pretrained", "checkpoint": file},
    "PretrainedInit": lambda file: {"type": "PretrainedInit", "checkpoint": file},
    "mmengine.Pretrained": lambda file: {"type": "mmengine.Pretrained", "checkpoint": file},
    "by _scope_": lambda file: {"type": "Pretrained", "_scope_": "mmengine", "checkpoint": file},
    "class": lambda file: {"type": PretrainedInit, "checkpoint": file},
    "path": lambda file: {"type": PATH, "checkpoint": file},
    "short path": lambda file: {"type": "mmengine.model.PretrainedInit", "checkpoint": file},
    "list": lambda file: [{"type": "Constant", "val": 0.5, "layer": "Conv2d"}, {"type": PATH, "checkpoint": file}],
    "tuple": lambda file: ({"type": "mmengine.Pretrained", "checkpoint": file},),
    "with a prefix": lambda file: {"type": PretrainedInit, "checkpoint": file, "prefix": "x.", "map_location": "cpu"},
}


class Payload:
    def __init__(self, mark: str | Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.mark),)
