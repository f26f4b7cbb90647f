"""Malicious configs: every place where a config may have a type, and names that must not be accepted there.

Each of :data:`ENTRY_POINTS` builds something with one type in one place. Each of :data:`SPELLINGS` is a name that must
neither be imported nor called there; ``evil_variant`` is the module of :func:`evil_module`, and creates a file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.registry import MODELS as ROOT_MODELS

from resbackbone import MODELS, build_backbone
from resbackbone.necks import FPN
from resbackbone.training.classification import ImageClassifier

EVIL = "evil_variant"
TINY = {"type": "ResNet", "depth": 50, "base_channels": 4}
SHARED = {"depth": 50, "stage": 0, "base_channels": 4}
_DEFORMED = {"stage_with_dcn": (True, False, False, False)}

SPELLINGS = (
    f"{EVIL}.Layer",
    f"{EVIL}.call",
    f"{EVIL}.inner.Layer",
    EVIL,
    f"{EVIL}.",
    f".{EVIL}",
    f"resbackbone.{EVIL}.Layer",
    f"mmengine.{EVIL}.Layer",
    f"mmdet.{EVIL}",
    f"mmcv.{EVIL}.Layer",
    f"torch.nn.{EVIL}.Layer",
    "os.system",
    "subprocess.Popen",
    "builtins.exec",
    "pathlib.Path.touch",
    "torch.load",
    "torch.hub.load",
    "torch.nn.init.ones_",
    "torch.nn.modules.module.torch.hub.load",
    "mmengine.Config",
    "mmengine.config.Config.fromfile",
    "mmengine.config.config.os.system",
    "mmengine.fileio.load",
    "mmengine.utils.misc.subprocess.Popen",
    "mmcv.cnn.bricks.conv.inspect.os.system",
    "resbackbone.config.build_backbone",
    "resbackbone.registry.lookup.import_modules",
    "resbackbone.__main__.main",
    "..",
    ".",
    "",
)


def _plugin(**cfg: Any) -> Any:
    return build_backbone({**TINY, "plugins": [{"cfg": cfg, "position": "after_conv2"}]})


def _fpn(**cfgs: Any) -> Any:
    return FPN(in_channels=[4, 8], out_channels=4, num_outs=2, **cfgs)


# What builds the config, by where in it the type stands.
ENTRY_POINTS: dict[str, Callable[[Any], Any]] = {
    "backbone": lambda type_: build_backbone({"type": type_}),
    "backbone with arguments": lambda type_: build_backbone({**TINY, "type": type_}),
    "override": lambda type_: build_backbone("resnet18", type=type_),
    "scope": lambda type_: build_backbone({**TINY, "_scope_": type_ or "no"}),
    "conv_cfg": lambda type_: build_backbone({**TINY, "conv_cfg": {"type": type_}}),
    "norm_cfg": lambda type_: build_backbone({**TINY, "norm_cfg": {"type": type_}}),
    "dcn": lambda type_: build_backbone({**TINY, **_DEFORMED, "dcn": {"type": type_}}),
    "sac": lambda type_: build_backbone({**TINY, "type": "DetectoRS_ResNet", "sac": {"type": type_}}),
    "plugin": lambda type_: _plugin(type=type_),
    "norm in an SE plugin's neighbor": lambda type_: _plugin(type="CBAM", norm_cfg={"type": type_}),
    "norm in mmcv's plugin": lambda type_: _plugin(type="NonLocal2d", norm_cfg={"type": type_}),
    "convolution in mmcv's plugin": lambda type_: _plugin(type="NonLocal2d", conv_cfg={"type": type_}),
    "norm in mmcv's ConvModule": lambda type_: _plugin(
        type="ConvModule", out_channels=4, kernel_size=1, norm_cfg={"type": type_}
    ),
    "activation in mmcv's ConvModule": lambda type_: _plugin(
        type="ConvModule", out_channels=4, kernel_size=1, act_cfg={"type": type_}
    ),
    "padding in mmcv's ConvModule": lambda type_: _plugin(
        type="ConvModule", out_channels=4, kernel_size=1, padding_mode=type_
    ),
    "FPN's conv_cfg": lambda type_: _fpn(conv_cfg={"type": type_}),
    "FPN's norm_cfg": lambda type_: _fpn(norm_cfg={"type": type_}),
    "FPN's act_cfg": lambda type_: _fpn(act_cfg={"type": type_}),
    "shared head's norm_cfg": lambda type_: MODELS.build({**SHARED, "type": "ResLayer", "norm_cfg": {"type": type_}}),
    "shared head's dcn": lambda type_: MODELS.build({**SHARED, "type": "ResLayer", "dcn": {"type": type_}}),
    "classifier's backbone": lambda type_: ImageClassifier({"type": type_}, num_classes=2),
    "classifier's norm_cfg": lambda type_: ImageClassifier({**TINY, "norm_cfg": {"type": type_}}, num_classes=2),
    "classifier's loss": lambda type_: ImageClassifier(TINY, num_classes=2, loss={"type": type_}),
    "init_cfg": lambda type_: build_backbone({**TINY, "init_cfg": {"type": type_}}),
    "init_cfg of a list": lambda type_: build_backbone({**TINY, "init_cfg": [{"type": type_, "layer": "Conv2d"}]}),
    "override of an init_cfg": lambda type_: build_backbone(
        {
            **TINY,
            "init_cfg": {"type": "Constant", "val": 1, "layer": "Conv2d", "override": {"name": "conv1", "type": type_}},
        }
    ),
    "FPN's init_cfg": lambda type_: _fpn(init_cfg={"type": type_}).init_weights(),
    "classifier's init_cfg": lambda type_: ImageClassifier(
        TINY, num_classes=2, init_cfg={"type": type_}
    ).init_weights(),
    "shared head's init_cfg": lambda type_: MODELS.build(
        {**SHARED, "type": "ResLayer", "init_cfg": {"type": type_}}
    ).init_weights(),
    "MODELS.build": lambda type_: MODELS.build({"type": type_}),
    "MODELS.build of a list": lambda type_: MODELS.build([{"type": type_}]),
    "MODELS.build by default_args": lambda type_: MODELS.build({}, default_args={"type": type_}),
    "MODELS.build of a nested config": lambda type_: MODELS.build({**TINY, "norm_cfg": {"type": type_}}),
    "MODELS.build by scope": lambda type_: MODELS.build({**TINY, "_scope_": type_ or "no"}),
    "mmengine's MODELS.build": lambda type_: ROOT_MODELS.build(
        {**TINY, "type": "resbackbone.ResNet", "norm_cfg": {"type": type_}}
    ),
}


@contextmanager
def evil_module(folder: Path) -> Iterator[Path]:
    """Put a module ``evil_variant`` on the path that leaves a mark when it is imported, and when it is called.

    Args:
        folder: Where it is written.

    Yields:
        The mark, a file that must not be there in the end.
    """
    mark = folder / "mark"
    code = f"""
import pathlib
from torch import nn

def call(*args, **kwargs):
    pathlib.Path({str(mark)!r}).touch()

class Layer(nn.Module):
    def __init__(self, *args, **kwargs):
        super().__init__()
        call()

call()
"""
    package = folder / EVIL
    package.mkdir()
    for name in ("__init__.py", "registry.py", "inner.py"):
        (package / name).write_text(code, encoding="utf-8")
    system = os.system
    sys.path.insert(0, str(folder))
    os.system = lambda command: mark.write_bytes(b"")
    try:
        yield mark
    finally:
        os.system = system
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.partition(".")[0] == EVIL]:
            del sys.modules[name]
