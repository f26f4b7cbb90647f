"""Every registered backbone, small, for what holds for all of them; a new class is here by being registered."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resbackbone import MODELS
from resbackbone.backbones import Backbone
from resbackbone.layers import ConvAWS2d

CLASSES: dict[str, Any] = {
    name: item
    for name, item in MODELS.module_dict.items()
    if inspect.isclass(item) and issubclass(item, Backbone) and item.__module__.startswith("resbackbone.")
}
# What makes a class small; those that are not here take their least depth and 8 channels.
SMALL: dict[str, dict[str, Any]] = {
    "ResNetV2": {"depth": 18, "base_channels": 8, "deep_stem": True},  # its plain stem has no norm
    "ResNeXt": {"depth": 50, "base_channels": 8, "groups": 4, "base_width": 4},
    "RegNet": {"arch": "regnetx_200mf"},
    "ResNetT": {"depth": 10, "base_channels": 8, "stem_channels": 16},  # of 8 its first convolution would have 3
}
# Beside each class with its defaults, options that change what the layers compute.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "ResNetV2-BiT": (
        "ResNetV2",
        {
            "deep_stem": False,
            "zero_padded_pool": True,
            "norm_cfg": {"type": "GN", "num_groups": 4},
            "conv_cfg": {"type": "StdConv2d", "eps": 1e-8},
        },
    ),
    "ResNet-caffe": ("ResNet", {"depth": 50, "style": "caffe"}),
    "ResNet-GN": ("ResNet", {"norm_cfg": {"type": "GN", "num_groups": 4}}),
    "ResNet-FrozenBN": ("ResNet", {"norm_cfg": {"type": "FrozenBN"}}),
    "ResNet-dilated": ("ResNet", {"strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4), "contract_dilation": True}),
    "ResNetAA-dilated": (
        "ResNetAA",
        {
            "avg_down": True,
            "strides": (1, 2, 1, 1),
            "dilations": (1, 1, 2, 4),
            "contract_dilation": True,
            "dilation_style": "timm",
        },
    ),
    "ResNet-DCNv2": (
        "ResNet",
        {"dcn": {"type": "DCNv2", "backend": "torch"}, "stage_with_dcn": (False, False, True, True)},
    ),
    "ResNetT-groups": ("ResNetT", {"depth": 26, "groups": 4, "base_width": 4, "stem_channels": 16}),
    "ResNetV2-tiered": ("ResNetV2", {"avg_down": True, "stem_channels": (6, 8, 16)}),
    "ResNetAA-groups": ("ResNetAA", {"depth": 26, "groups": 4, "base_width": 4}),
    "ResNetIBN-groups": ("ResNetIBN", {"depth": 26, "groups": 4, "base_width": 4}),
    "SKResNet-groups": ("SKResNet", {"depth": 26, "groups": 4, "base_width": 4}),
    "SKResNet-split": ("SKResNet", {"split_input": True}),
    "ResNetIBN-b": ("ResNetIBN", {"ibn": "b"}),
    "ResNeSt-groups": ("ResNeSt", {"groups": 2, "base_width": 8, "radix": 4}),
    "DetectoRS-SAC": (
        "DetectoRS_ResNet",
        {
            "conv_cfg": {"type": "ConvAWS"},
            "sac": {"type": "SAC", "use_deform": True, "backend": "torch"},
            "stage_with_sac": (False, True, True, True),
        },
    ),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in CLASSES} | OPTIONS

every_class = pytest.mark.parametrize("case", CLASSES)
every_case = pytest.mark.parametrize("case", CASES)


def small(name: str) -> dict[str, Any]:
    return SMALL.get(name) or {"depth": min(CLASSES[name].arch_settings), "base_channels": 8}


def arguments_of(case: str, **options: Any) -> dict[str, Any]:
    """The constructor's arguments of a small net whose norms train."""
    name, own = CASES[case]
    return {**small(name), "norm_eval": False, **own, **options}


def stages(net: Backbone) -> list[list[Any]]:
    """The blocks of each stage."""
    return [list(getattr(net, name)) for name in net.res_layers]


def blocks(net: Backbone) -> list[Any]:
    """The blocks of all stages."""
    return [block for stage in stages(net) for block in stage]


def make(case: str, **options: Any) -> Any:
    net = CLASSES[CASES[case][0]](**arguments_of(case, **options))
    for layer in net.modules():
        if isinstance(layer, ConvAWS2d):
            layer.init_weights()  # or the activations would grow from layer to layer
    return net


def batch_norms(net: nn.Module) -> list[_BatchNorm]:
    return [module for module in net.modules() if isinstance(module, _BatchNorm)]


class Gate(nn.Module):
    """A plugin, cheap and with dropout, to see plugins at work without mmcv."""

    _abbr_ = "gate"

    def __init__(self, in_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.scale = nn.Parameter(torch.full((in_channels, 1, 1), 0.5))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(x) * self.scale
        return out


def one_block_per_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every depth shallow, two blocks in the second stage, for what takes long per block and shows nothing new."""
    for net_class in CLASSES.values():
        settings: dict[Any, Any] = {}
        for depth, value in net_class.arch_settings.items():
            block, counts = value if isinstance(value, tuple) else (None, ())
            settings[depth] = (block, (1, 2, 1, 1)[: len(counts)]) if block else value
        monkeypatch.setattr(net_class, "arch_settings", settings)
