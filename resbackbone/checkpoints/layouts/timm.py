"""Key layouts of timm: ``resnet.py`` and related files, pre-activation ResNets, and RegNet.

Source: timm 1.0.31, ``models/resnet.py``, ``sknet.py``, ``resnetv2.py``, ``regnet.py``, ``senet.py`` (the old names).
"""

from __future__ import annotations

from resbackbone.checkpoints.layouts.layout import Layout, Tensors
from resbackbone.checkpoints.layouts.table import Table

_ATTENTION = """
    layer{s}.{b}.se_layer.conv{k}.conv  layer{s}.{b}.se.fc{k}
    layer{s}.{b}.eca_layer.conv         layer{s}.{b}.se.conv
"""
# The deep stem is `conv1`, except its last norm, which is `bn1` as in the plain stem.
_DEEP_STEM = """
    stem.7    bn1
    stem.{i}  conv1.{i}
"""
# In blocks with selective kernels each convolution holds its norm.
_SELECTIVE = """
    layer{s}.{b}.conv{k}  layer{s}.{b}.conv{k}.conv
    layer{s}.{b}.bn{k}    layer{s}.{b}.conv{k}.bn
"""
# Only native keys have other names for group norms than for batch norms.
_GROUP_NORMS = """
    gn1                 bn1
    layer{s}.{b}.gn{k}  layer{s}.{b}.bn{k}
"""
_OLD = """
    conv1                               layer0.conv1
    bn1                                 layer0.bn1
    layer{s}.{b}.se_layer.conv{k}.conv  layer{s}.{b}.se_module.fc{k}
    fc                                  last_linear
"""

TIMM = Layout(
    "timm",
    tables=(
        Table(_ATTENTION),
        Table(_ATTENTION + _DEEP_STEM),
        Table(_ATTENTION + _GROUP_NORMS, only_with=".gn1."),
        Table(_SELECTIVE, only_with=".paths."),
        Table(_SELECTIVE + _DEEP_STEM, only_with=".paths."),
    ),
    old=(Table(_OLD),),
)


def _resnetv2(*rows: str, joint: str = ".") -> Table:
    """Return the table for one stem; with timm's ``features_only`` the first ``joint`` of a key is "_"."""
    rows = (
        "layer{s}.{b}.conv{k}  stages.{s-1}.blocks.{b}.conv{k}",
        "layer{s}.{b}.bn{k}    stages.{s-1}.blocks.{b}.norm{k}",
        *rows,
    )
    text = "\n".join(rows).replace("stages.", f"stages{joint}").replace(" stem.", f" stem{joint}")
    return Table(f"{text}\n bn norm\n fc head.fc")


_PLAIN = ("conv1  stem.conv", "layer{s}.{b}.downsample.0  stages.{s-1}.blocks.{b}.downsample.conv")
_DEEP = (
    "stem.0                     stem.conv1",
    "stem.1                     stem.norm1",
    "stem.3                     stem.conv2",
    "stem.4                     stem.norm2",
    "stem.6                     stem.conv3",
    "layer{s}.{b}.downsample.1  stages.{s-1}.blocks.{b}.downsample.conv",
)


def _reshape_classifier(tensors: Tensors, dims: int) -> Tensors:
    """Reshape the classifier, which is a 1x1 convolution there."""
    weight = tensors.get("fc.weight")
    if weight is not None:
        tensors["fc.weight"] = weight.reshape(weight.shape[:2] + (1,) * (dims - 2))
    return tensors


TIMM_RESNETV2 = Layout(
    "timm-resnetv2",
    tables=(_resnetv2(*_PLAIN), _resnetv2(*_DEEP)),
    old=(_resnetv2(*_PLAIN, joint="_"), _resnetv2(*_DEEP, joint="_")),
    values_to_native=lambda tensors: _reshape_classifier(tensors, 2),
    values_to_foreign=lambda tensors: _reshape_classifier(tensors, 4),
)

TIMM_REGNET = Layout(
    "timm-regnet",
    tables=(
        Table(
            """
            conv1                               stem.conv
            bn1                                 stem.bn
            layer{s}.{b}.conv{k}                s{s}.b{b+1}.conv{k}.conv
            layer{s}.{b}.bn{k}                  s{s}.b{b+1}.conv{k}.bn
            layer{s}.{b}.se_layer.conv{k}.conv  s{s}.b{b+1}.se.fc{k}
            layer{s}.{b}.downsample.0           s{s}.b{b+1}.downsample.conv
            layer{s}.{b}.downsample.1           s{s}.b{b+1}.downsample.bn
            fc                                  head.fc
            """
        ),
    ),
)
