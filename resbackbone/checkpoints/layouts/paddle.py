"""Key layout of PaddleDetection: letters for blocks, and transposed weights of linear layers.

Source: PaddlePaddle/PaddleDetection, ``ppdet/modeling/backbones/resnet.py`` and ``name_adapter.py``.
"""

from __future__ import annotations

import re

from resbackbone.checkpoints.layouts.layout import Layout, Tensors
from resbackbone.checkpoints.layouts.table import Table

_BLOCK = "res{s+1}.res{s+1}{b:block}"
_ATTENTION = [
    (f"layer{{s}}.{{b}}.se_layer.conv{index}.conv.{{p}}", f"{_BLOCK}.se.{name}.{{p}}")
    for index, name in ((1, "squeeze"), (2, "extract"))
]


def _conv_and_norm(conv: str, norm: str, foreign: str) -> list[tuple[str, str]]:
    statistics = (("running_mean", "_mean"), ("running_var", "_variance"))
    return [
        (f"{conv}.weight", f"{foreign}.conv.weight"),
        *((f"{norm}.{parameter}", f"{foreign}.norm.{parameter}") for parameter in ("weight", "bias")),
        *((f"{norm}.{ours}", f"{foreign}.norm.{theirs}") for ours, theirs in statistics),
    ]


def _table(*rows: list[tuple[str, str]]) -> Table:
    stages = _conv_and_norm("layer{s}.{b}.conv{k}", "layer{s}.{b}.bn{k}", _BLOCK + ".branch2{k:letter}")
    rows = (*rows, stages, _ATTENTION, [("fc.{p}", "fc.{p}")])
    return Table("\n".join(f"{ours} {theirs}" for part in rows for ours, theirs in part), full_names=True)


_PLAIN_STEM = _conv_and_norm("conv1", "bn1", "conv1.conv1") + _conv_and_norm("conv1", "bn1", "conv1.res_conv1")
_DEEP_STEM = [
    *_conv_and_norm("stem.0", "stem.1", "conv1.conv1_1"),
    *_conv_and_norm("stem.3", "stem.4", "conv1.conv1_2"),
    *_conv_and_norm("stem.6", "stem.7", "conv1.conv1_3"),
]
_SHORTCUT = _conv_and_norm("layer{s}.{b}.downsample.0", "layer{s}.{b}.downsample.1", _BLOCK + ".short")
_POOLING_SHORTCUT = [
    *_conv_and_norm("layer1.{b}.downsample.1", "layer1.{b}.downsample.2", "res2.res2{b:block}.short"),
    *_conv_and_norm("layer{s}.{b}.downsample.1", "layer{s}.{b}.downsample.2", _BLOCK + ".short.conv"),
]


def _transpose(tensors: Tensors) -> Tensors:
    """Convert the linear layers of attention to 1x1 convolutions."""
    return {
        name: tensor.t()[:, :, None, None] if _is_attention(name) and tensor.dim() == 2 else tensor
        for name, tensor in tensors.items()
    }


def _transpose_back(tensors: Tensors) -> Tensors:
    return {name: tensor[:, :, 0, 0].t() if _is_attention(name) else tensor for name, tensor in tensors.items()}


def _is_attention(name: str) -> bool:
    return re.search(r"\.se_layer\.conv\d\.conv\.weight$", name) is not None


def _transpose_classifier(tensors: Tensors) -> Tensors:
    return {name: tensor.t() if name == "fc.weight" else tensor for name, tensor in tensors.items()}


PADDLE = Layout(
    "paddle",
    tables=(
        _table(_PLAIN_STEM, _SHORTCUT),
        _table(_DEEP_STEM, _SHORTCUT),
        _table(_DEEP_STEM, _POOLING_SHORTCUT),
    ),
    values_to_native=lambda tensors: _transpose_classifier(_transpose(tensors)),
    values_to_foreign=lambda tensors: _transpose_classifier(_transpose_back(tensors)),
)
